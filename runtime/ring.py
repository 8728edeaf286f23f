"""The tables of a bundle: rows, addresses and control words, filled on the host, copied at once.

One bundle's table is ``[control][rows][input 0]…[output 0]…`` in 64-bit words. The first word holds two
int32, the active slots and the cap in multiprocessors; the second the same with every slot active, which the
gather reads so that padding slots hold valid inputs. Each section starts on 16 bytes: kernels specialise on
the alignment of their arguments, and must not be compiled again because a bundle is larger.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from torch_mux import compat
from torch_mux.lowering.program import Program

__all__ = ["Layouts", "RingEntry", "TableLayout", "TableRing"]

_CONTROL_WORDS = 2


@dataclass(frozen=True)
class TableLayout:
    """Where the sections of a table lie, in words, for so many slots, tensor inputs and tensor outputs."""

    slots: int
    inputs: int
    outputs: int

    @classmethod
    def of(cls, program: Program, slots: int) -> TableLayout:
        """The layout of bundles of ``slots`` slots of a program."""
        inputs = sum(spec is not None for spec in program.inputs)
        return cls(slots, inputs, sum(spec is not None for spec in program.outputs))

    @cached_property
    def stride(self) -> int:
        """Words from one section to the next."""
        return self.slots + self.slots % 2

    @cached_property
    def words(self) -> int:
        """Words of the whole table."""
        return _CONTROL_WORDS + self.stride * (1 + self.inputs + self.outputs)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the whole table."""
        return 8 * self.words

    def section(self, number: int, before: int = 0) -> slice:
        """The words of section ``number``: 0 is the rows, then the inputs, then the outputs.

        Args:
            before: words in front of the table.
        """
        start = before + _CONTROL_WORDS + self.stride * number
        return slice(start, start + self.slots)

    def control(self, table: Tensor) -> Tensor:
        """int32 [2]: active slots and cap."""
        return table[0:1].view(torch.int32)

    def control_of_all(self, table: Tensor) -> Tensor:
        """int32 [2]: all slots and cap."""
        return table[1:2].view(torch.int32)

    def rows(self, table: Tensor) -> Tensor:
        """int64 [slots]."""
        return table[self.section(0)]

    def input(self, table: Tensor, index: int) -> Tensor:
        """int64 [slots]: addresses of the tensor input ``index``."""
        return table[self.section(1 + index)]

    def output(self, table: Tensor, index: int) -> Tensor:
        """int64 [slots]: addresses of the tensor output ``index``."""
        return table[self.section(1 + self.inputs + index)]


class Asked(Protocol):
    """What a table says of a request."""

    inputs: Sequence[object]
    outputs: list[object]


class Layouts:
    """The tables of one program's bundles, by slots; any thread may ask."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._inputs = [index for index, spec in enumerate(program.inputs) if spec is not None]
        self._outputs = [index for index, spec in enumerate(program.outputs) if spec is not None]
        self._known: dict[int, TableLayout] = {}

    def of(self, slots: int) -> TableLayout:
        """See :meth:`TableLayout.of`."""
        found = self._known.get(slots)
        if found is None:
            found = self._known[slots] = TableLayout.of(self._program, slots)
        return found

    def columns(self, requests: Sequence[Asked]) -> tuple[list[list[Any]], list[list[Any]]]:
        """The tensors of each tensor input and of each tensor output, one a request."""
        inputs = [[one.inputs[index] for one in requests] for index in self._inputs]
        return inputs, [[one.outputs[index] for one in requests] for index in self._outputs]


class Waits(Protocol):
    """The end of what may still read an entry."""

    def wait(self) -> None:
        """Blocks the host until it does no longer."""
        ...


class RingEntry:
    """One pinned table. It may be filled again once the bundle that reads it has ended."""

    def __init__(self, words: int, pinned: bool) -> None:
        self.host = torch.zeros(words, dtype=torch.int64, device="cpu", pin_memory=pinned)
        self.address = self.host.data_ptr()
        self._words = words
        self._halves = (ctypes.c_int32 * (2 * words)).from_address(self.address)
        self.reader: Waits | None = None
        self.copies: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def fill(
        self,
        layout: TableLayout,
        rows: list[int],
        cap: int,
        inputs: Sequence[list[Tensor]],
        outputs: Sequence[list[Tensor]],
        start: int = 0,
    ) -> None:
        """Writes one bundle's table.

        Args:
            start: words before it, an even number; other programs' tables.
            rows: one a request; slots beyond them are padded with the first request's row and addresses.
            cap: in multiprocessors.
            inputs: the tensors of each input, one a request.
            outputs: the tensors of each output, one a request.
        """
        if start + layout.words > self._words:
            raise ValueError(f"a table of {layout.words} words does not fit behind {start} of {self._words}")
        address = self.address + 8 * start
        compat.native.checks().fill(address, layout.slots, cap, rows, [*inputs, *outputs])

    def deactivate(self) -> None:
        """No slot is active any more: kernels do nothing for this table."""
        self._halves[0] = 0


class TableRing:
    """The pinned tables of one lane, and the device copy that they take turns to fill."""

    def __init__(self, entries: int, words: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._entries = [RingEntry(words, pinned) for _ in range(entries)]
        self._next = 0
        self.table = torch.zeros(words, dtype=torch.int64, device=device)
        self.address = self.table.data_ptr()

    def take(self, reader: Waits | None) -> RingEntry:
        """The entry that was used longest ago; blocks the host while its bundle has not ended.

        Args:
            reader: the end of the flight that is about to use the entry.
        """
        entry = self._entries[self._next]
        self._next = (self._next + 1) % len(self._entries)
        if entry.reader is not None:
            entry.reader.wait()
        entry.reader = reader
        return entry

    def send(self, entry: RingEntry, words: int, start: int = 0) -> None:
        """Enqueues the copy of ``words`` words of an entry to the device, on the current stream.

        Args:
            start: words of the entry before them.
        """
        views = entry.copies.get((words, start))
        if views is None:
            views = entry.copies[words, start] = (self.table[:words], entry.host[start : start + words])
        views[0].copy_(views[1], non_blocking=True)

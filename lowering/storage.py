"""The address-stable tables through which coalesced code reaches each instance's weights.

A row belongs to one instance. The pointer table holds the addresses of weight matrices; the arenas, one a
dtype, hold copies of the small parameters (norms, biases, positions, folded batch-norm) side by side, so that
one batched graph can index them.
"""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from torch_mux import compat
from torch_mux.errors import TooManyInstances

from .prepare import Prepare

__all__ = ["Field", "Layout", "Storage", "storage_of"]

log = logging.getLogger(__name__)

_UNTRACKED: Final = (
    "parameters of a model were made under inference mode, where PyTorch counts no writes to them: the model"
    " is prepared again for every request, which can take longer than that; make it outside of inference mode"
)
#: Weight addresses and arena fields are multiples of this many bytes.
ALIGNMENT: Final = 16
_ROWS_AT_FIRST: Final = 32

_Known = tuple[compat.native.Checks, Any]
_registering = threading.Lock()
_storages: weakref.WeakValueDictionary[str, Storage] = weakref.WeakValueDictionary()


class _OptimizerEpoch:
    """Counts optimizer steps: fused and collective optimizers write parameters without a version bump."""

    value = 0

    def step(self, *_: object) -> None:
        self.value += 1


_epoch: Final = _OptimizerEpoch()
register_optimizer_step_post_hook(_epoch.step)


def storage_of(key: str) -> Storage:
    """The live storage with that key.

    Raises:
        KeyError: it was dropped; the code that still names it belongs to a dropped plan.
    """
    return _storages[key]


@dataclass(frozen=True)
class Field:
    """Where a value lies in the arena of its dtype, in elements."""

    dtype: torch.dtype
    offset: int
    numel: int


@dataclass(frozen=True)
class Layout:
    """What a plan reads of an instance.

    Attributes:
        columns: prepared-value index of each pointer column.
        fields: arena place of each prepared value that batched code reads, by value index.
        widths: arena width in elements, by dtype.
    """

    columns: tuple[int, ...]
    fields: dict[int, Field]
    widths: dict[torch.dtype, int]


@dataclass
class _Row:
    parameters: list[Tensor]
    values: tuple[Tensor, ...]
    weights: list[Tensor]
    checks: compat.native.Checks
    known: Any
    epoch: int
    copied: int
    untracked: bool = field(default=False)


def _covering(prepare: Prepare) -> list[int]:
    """Parameters whose addresses tell whether the values are still those of the model, also after ``.to()``.

    That moves all parameters of a layer and bumps no version, so one source a computed value is enough.
    """
    direct = [sources for index, sources in enumerate(prepare.sources) if prepare.direct[index]]
    found = {source for sources in direct for source in sources}
    for sources in prepare.sources:
        if sources and not found.intersection(sources):
            found.add(sources[0])
    return sorted(found)


def _known(held: Sequence[Tensor], watched: Iterable[int], pointed: Sequence[Tensor]) -> _Known:
    """What tells later whether the watched tensors were written or the pointed ones moved."""
    checks = compat.native.checks()
    return checks, checks.weights([held[position] for position in sorted(watched)], pointed)


def _moved(value: Tensor) -> Tensor:
    """A copy at an aligned address with the very strides of ``value``, which compiled code counts on."""
    copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return copy.copy_(value)


class Storage:
    """The tables of one plan on one device; safe to use from several threads.

    Args:
        key: what generated code calls it, if that is free; by default the first free name of the program.
    """

    def __init__(
        self,
        fingerprint: str,
        device: torch.device,
        prepare: Prepare,
        layout: Layout,
        key: str | None = None,
    ) -> None:
        self.key = ""
        self.device = device
        self.prepare = prepare
        self.layout = layout
        self.generation = 0
        self.most_rows = 1 << 20
        self._lock = threading.RLock()
        self._rows: dict[int, _Row] = {}
        self._free: list[int] = []
        self._warned = False
        self.capacity = 0
        self.table = torch.empty(0)
        self.arenas: dict[torch.dtype, Tensor] = {}
        with torch.inference_mode(False):
            self._grow(_ROWS_AT_FIRST)
        self._register(fingerprint[:16], key)

    def _register(self, name: str, wanted: str | None) -> None:
        """Takes a free key: generated code names it, and is found on disk again if it is the same."""
        with _registering:
            numbers = (f"{name}-{number}" for number in itertools.count())
            keys = numbers if wanted is None else itertools.chain([wanted], numbers)
            self.key = next(key for key in keys if key not in _storages)
            _storages[self.key] = self

    def _grow(self, capacity: int) -> None:
        """Moves the tables to ``capacity`` rows; code captured for the old ones keeps its own references."""
        table = torch.zeros(
            (capacity, max(1, len(self.layout.columns))), dtype=torch.int64, device=self.device
        )
        arenas = {
            dtype: torch.zeros((capacity, width), dtype=dtype, device=self.device)
            for dtype, width in self.layout.widths.items()
        }
        if self.capacity:
            table[: self.capacity].copy_(self.table)
            for dtype, arena in arenas.items():
                arena[: self.capacity].copy_(self.arenas[dtype])
        self._free.extend(range(capacity - 1, self.capacity - 1, -1))
        self.table, self.arenas, self.capacity = table, arenas, capacity
        self.generation += 1

    def bind(self, parameters: Sequence[Tensor]) -> int:
        """Takes a row for an instance, prepares its values and writes them, on the current stream.

        Args:
            parameters: the program's parameters and buffers in order; held as detached aliases only.
        """
        with self._lock, torch.inference_mode(False):
            if not self._free:
                if self.capacity >= self.most_rows:
                    raise TooManyInstances(limit=self.most_rows)
                self._grow(min(self.capacity * 2, self.most_rows))
            row = self._free.pop()
            try:
                self._write(row, parameters)
            except BaseException:
                self._free.append(row)
                raise
            return row

    def refresh(self, row: int, parameters: Sequence[Tensor]) -> None:
        """Prepares the instance again and rewrites its row, on the current stream."""
        with self._lock, torch.inference_mode(False):
            self._write(row, parameters)

    def release(self, row: int) -> None:
        """Gives the row back; nothing enqueued may still read it."""
        with self._lock:
            del self._rows[row]
            self._free.append(row)

    def _write(self, row: int, parameters: Sequence[Tensor]) -> None:
        epoch = _epoch.value
        prepare, layout = self.prepare, self.layout
        untracked = any(parameter.is_inference() for parameter in parameters)
        if untracked and not self._warned:
            self._warned = True
            log.warning(_UNTRACKED)
        held = [parameter.detach() for parameter in parameters]
        watched = {
            source
            for index, sources in enumerate(prepare.sources)
            for source in sources
            if index in layout.fields or not prepare.direct[index]
        }
        pointed = [parameters[position] for position in _covering(prepare)]
        checks, known = _known(held, () if untracked else watched, pointed)
        values = list(prepare.run(held))
        for index in layout.columns:
            if values[index].data_ptr() % ALIGNMENT:
                values[index] = _moved(values[index])
                watched = {*watched, *prepare.sources[index]}
                checks, known = _known(held, () if untracked else watched, pointed)
        self._copy_in(row, values)
        copies = [value for i, value in enumerate(values) if not prepare.direct[i] and i in layout.columns]
        self._rows[row] = _Row(
            parameters=held,
            values=tuple(values),
            weights=[values[index] for index in layout.columns],
            checks=checks,
            known=known,
            epoch=epoch,
            copied=sum(copy.untyped_storage().nbytes() for copy in copies),
            untracked=untracked,
        )

    def _copy_in(self, row: int, values: Sequence[Tensor]) -> None:
        targets, sources = [], []
        for index, place in self.layout.fields.items():
            arena = self.arenas[place.dtype]
            targets.append(arena[row, place.offset : place.offset + place.numel])
            sources.append(values[index].reshape(-1))
        if targets:
            torch._foreach_copy_(targets, sources)
        addresses = [values[index].data_ptr() for index in self.layout.columns]
        if addresses:
            self.table[row].copy_(torch.tensor(addresses, dtype=torch.int64))
        if self.device.type == "cuda":  # another lane may read the row next, and no event orders the two
            torch.cuda.current_stream(self.device).synchronize()

    def stale(self, row: int) -> bool:
        """Whether a write in place, a moved pointer or an optimizer step made the row's contents old.

        Compares one version counter a copied parameter and about one address a value. Writes through
        ``.data`` to a copied parameter bump no version: they need ``torch_mux.refresh``.
        """
        state = self._rows[row]
        return state.untracked or state.epoch != _epoch.value or state.checks.changed(state.known)

    def watched(self, rows: Iterable[int]) -> list[Any] | None:
        """What ``compat.native.Enqueue`` compares in place of :meth:`stale`, or None where it cannot."""
        states, epoch = [self._rows[row] for row in rows], _epoch.value
        known = [one.known for one in states if one.checks.free and not one.untracked and one.epoch == epoch]
        return known if len(known) == len(states) else None

    def weights(self, rows: Sequence[int], column: int) -> list[Tensor]:
        """The weight tensors behind a pointer column, one a slot: what the CPU reads instead of addresses."""
        return [self._rows[row].weights[column] for row in rows]

    def values(self, row: int) -> tuple[Tensor, ...]:
        """All prepared values of an instance, for segments that run per instance."""
        return self._rows[row].values

    def nbytes(self, row: int | None) -> int:
        """Bytes held for this instance beyond its weights: prepared copies and its share of the tables.

        None: what one more instance will take.
        """
        fixed = self.table.shape[1] * 8 + sum(
            arena.shape[1] * arena.itemsize for arena in self.arenas.values()
        )
        state = None if row is None else self._rows.get(row)
        if state is None:
            prepare = self.prepare
            pairs = zip(prepare.specs, prepare.direct, strict=True)
            return fixed + sum(spec.nbytes for spec, direct in pairs if not direct)
        return fixed + state.copied

"""The CPU executor: the same programs and the same bundles, run by the thread that dispatches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor

from torch_mux.compat.cpu_threads import threads
from torch_mux.lowering.program import Program
from torch_mux.runtime.bundle import Bundle, cap_of
from torch_mux.runtime.executors.base import (
    ExecutorReport,
    Flight,
    Stack,
    bound_rows,
    plain_context,
    run_each_alone,
)
from torch_mux.runtime.executors.cpu_mixes import Background, CpuMixes, at_once
from torch_mux.runtime.interrupt import Interrupt
from torch_mux.runtime.mixes import MixReport
from torch_mux.runtime.request import Request
from torch_mux.runtime.scheduler.base import LaneLoad, QueueName, idle_lanes
from torch_mux.runtime.served import ServedProgram
from torch_mux.settings import Settings

__all__ = ["CpuExecutor"]

_UNLIMITED = 1 << 30
_KEPT = 256


class _Stacks:
    """Input buffers of one program, grown to the largest bundle seen and shared by all sizes."""

    def __init__(self, program: Program, stack: Stack) -> None:
        self._stack = stack
        self._specs = [spec for spec in program.inputs if spec is not None]
        self._room = 0
        self._whole: list[Tensor] = []
        self._parts: dict[int, tuple[list[Tensor], list[tuple[Tensor, ...]]]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(whole.nbytes for whole in self._whole)

    def of(self, slots: int) -> tuple[list[Tensor], list[tuple[Tensor, ...]]]:
        """(one [slots, *shape] tensor an input, their slots as views)."""
        if slots > self._room:
            self._whole = [self._stack(spec, slots) for spec in self._specs]
            self._room = slots
            self._parts.clear()
        part = self._parts.get(slots)
        if part is None:
            tensors = [whole.narrow(0, 0, slots) for whole in self._whole]
            part = self._parts[slots] = (tensors, [tensor.unbind(0) for tensor in tensors])
        return part


class CpuExecutor:
    """Runs each bundle to its end. Caps and lanes are recorded, not enforced: there is one unit.

    Any client's thread may dispatch, and torch keeps a number of threads for each: all bundles run with the
    one that torch had when the executor was made or configured, since sums depend on how they are split.

    Args:
        stack: ``stack_buffer`` of lowering.
        background: has a job done off the request path.
    """

    def __init__(self, device: torch.device, stack: Stack, background: Background = at_once) -> None:
        self.device = device
        self._stack = stack
        self.sms = 1
        self._threads = torch.get_num_threads()
        self.fault: Exception | None = None
        self._stacks: dict[ServedProgram, _Stacks] = {}
        self._controls: dict[tuple[int, int], Tensor] = {}
        self._rows: dict[tuple[int, ...], Tensor] = {}
        self.together, self.asynchronous = 1, False
        self._mixes = CpuMixes(background)
        self._loads: Sequence[LaneLoad] = (LaneLoad(),)

    def configure(self, settings: Settings) -> None:
        """Takes over torch's present number of threads; see :class:`CpuExecutor`."""
        self._threads = torch.get_num_threads()
        self.together = settings.pack or 1
        self._mixes.configure(settings)
        self._loads = idle_lanes(settings, settings.branches or 1)

    def slots(self, program: Program) -> int:
        """There are no tables to run out of."""
        return _UNLIMITED

    def rehearse(self, served: ServedProgram) -> None:
        """Nothing is compiled at the first run."""

    def loads(self) -> Sequence[LaneLoad]:
        """Every lane is idle whenever somebody can ask."""
        return self._loads

    def mark(self) -> object:
        """A CPU has no streams."""
        return None

    def launch(self, bundle: Bundle) -> Flight | None:
        """Runs the bundle to its end."""
        with self._context(bundle):
            if bundle.served.active.coalesced:
                rows = bound_rows(bundle, verify=True)
                with torch.inference_mode():
                    self._run(bundle, rows)
            else:
                run_each_alone(bundle)
        return None

    @contextmanager
    def _context(self, bundle: Bundle) -> Iterator[None]:
        count = 1 if bundle.served.active.small else self._threads
        with plain_context(self.device.type), threads(count):
            yield

    def packs(self, served: ServedProgram) -> bool:
        """Programs without per-instance segments, as on a GPU."""
        return served.compiled.capturable

    def launch_together(self, bundles: Sequence[Bundle]) -> Sequence[Flight] | None:
        """Runs the bundles to their end, operation by operation in turn."""
        bodies = []
        for bundle in bundles:
            with self._context(bundle):
                bodies.append(partial(self._member, bundle, bound_rows(bundle, verify=True)))
        return () if self._mixes.run(bundles, bodies) else None

    def _member(self, bundle: Bundle, rows: list[int]) -> None:
        with self._context(bundle), torch.inference_mode():
            self._run(bundle, rows)

    def mixes(self) -> Sequence[MixReport]:
        """The mixes that went out."""
        return self._mixes.book.reports()

    def _run(self, bundle: Bundle, rows: list[int]) -> None:
        served, requests = bundle.served, bundle.requests
        stacks = self._stacks.get(served)
        if stacks is None:
            stacks = self._stacks[served] = _Stacks(served.program, self._stack)
        inputs, columns = stacks.of(len(requests))
        for index, column in enumerate(columns):
            for place, request in zip(column, requests, strict=True):
                place.copy_(cast(Tensor, request.inputs[index]))
        control = self._control(len(requests), cap_of(bundle.share, self.sms))
        results = served.compiled.run(self._row_tensor(tuple(rows)), control, inputs)
        position = 0
        for index, spec in enumerate(served.program.outputs):
            if spec is not None:
                _deal(results[position], requests, index)
                position += 1

    def _row_tensor(self, rows: tuple[int, ...]) -> Tensor:
        # Making a tensor of a list costs more than the rest of the tables.
        tensor = self._rows.get(rows)
        if tensor is None:
            if len(self._rows) >= _KEPT:
                self._rows.clear()
            tensor = self._rows[rows] = torch.tensor(rows)
        return tensor

    def _control(self, slots: int, cap: int) -> Tensor:
        control = self._controls.get((slots, cap))
        if control is None:
            if len(self._controls) >= _KEPT:
                self._controls.clear()
            control = self._controls[slots, cap] = torch.tensor([slots, cap], dtype=torch.int32)
        return control

    def reap(self) -> Sequence[Flight]:
        """Nothing is ever under way."""
        return ()

    def flying(self) -> bool:
        """Nothing is ever under way."""
        return False

    def at_work(self) -> Sequence[Flight]:
        """Nothing is ever under way."""
        return ()

    def at_it(self, name: QueueName) -> bool:
        """Nothing is ever under way."""
        return False

    def await_end(self, interrupt: Interrupt | None = None) -> None:
        """Nothing is ever under way."""

    def join(self, requests: Sequence[Request]) -> None:
        """What has gone out is computed."""

    def forget(self, served: ServedProgram) -> None:
        """Drops the input buffers and the mixes of a program."""
        self._stacks.pop(served, None)
        self._mixes.book.forget(served.key)

    def pool_bytes(self) -> int:
        """The programs' input buffers."""
        return sum(stacks.nbytes for stacks in list(self._stacks.values()))

    def report(self, served: ServedProgram) -> ExecutorReport:
        """Nothing is captured on a CPU."""
        return ExecutorReport()


def _deal(batched: Tensor, requests: Sequence[Request], index: int) -> None:
    """Copies each slot of one batched output into that request's own tensor."""
    for request, piece in zip(requests, batched.unbind(0), strict=True):
        cast(Tensor, request.outputs[index]).copy_(piece)

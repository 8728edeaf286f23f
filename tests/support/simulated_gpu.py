"""A GPU that only takes time, under the real CUDA executor: streams, events, graphs, captures.

What holds the interpreter's lock on a GPU machine holds it here, and what gives it up does so: an enqueued
bundle costs the host some microseconds without the lock, a launch of kernels one by one and a capture
milliseconds of Python, and the device works on while the host does nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from torch_mux import compat
from torch_mux.lowering.program import Program
from torch_mux.runtime import lanes
from torch_mux.runtime.engine import Engine
from torch_mux.runtime.executors import cuda
from torch_mux.runtime.executors.capture import Capturer
from torch_mux.runtime.executors.cuda import CudaExecutor
from torch_mux.runtime.lanes import Executable, Lane
from torch_mux.runtime.mixes import MixReport
from torch_mux.runtime.ring import TableLayout
from torch_mux.runtime.served import ServedProgram
from torch_mux.settings import Settings

__all__ = ["SimulatedGpu", "SimulatedPlan", "Timing", "burn", "hold", "simulated_engine"]

_addresses = itertools.count(1 << 20)
_BUFFER = bytes(1 << 20)
_PROPERTIES = mock.Mock(multi_processor_count=132)


def burn(seconds: float) -> None:
    """Python that computes: it gives the interpreter's lock up when another thread has asked for it."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def hold(seconds: float) -> None:
    """One call into C that keeps the interpreter's lock."""
    sum(range(round(seconds * 8e7)))


def work(seconds: float) -> None:
    """A call into C without the interpreter's lock."""
    zlib.crc32(_BUFFER[: round(min(1.0, seconds / 1e-3) * len(_BUFFER))] or _BUFFER[:8192])


_clocks: list[Callable[[], float]] = [time.perf_counter]


def _now() -> float:
    return _clocks[-1]()


def _sleep_until(moment: float) -> None:
    while (left := moment - _now()) > 0.0:
        time.sleep(left if _clocks[-1] is time.perf_counter else min(left, 0.25e-3))


@dataclass
class Timing:
    """What things take, in seconds.

    Attributes:
        bundle: device seconds of a bundle, of its program's name and slots.
        enqueue: host seconds of an enqueued graph, without the interpreter's lock.
        launches: host seconds of Python of a bundle without a graph, and of a rehearsal.
        capture: host seconds of Python of a capture, in pieces of ``piece``.
        snapshot: host seconds in which the pool is measured, with the interpreter's lock held throughout.
    """

    bundle: Callable[[str, int], float] = lambda name, slots: 300e-6 + 50e-6 * (slots - 1)
    enqueue: float = 40e-6
    launches: float = 5e-3
    capture: float = 80e-3
    piece: float = 1e-3
    snapshot: float = 3e-3


@dataclass(eq=False)
class _Stream:
    device: torch.device
    cuda_stream: int = field(default_factory=lambda: next(_addresses))
    free: float = 0.0

    def wait_event(self, event: Any) -> None:
        self.free = max(self.free, event.at)

    def synchronize(self) -> None:
        _sleep_until(self.free)


class _Event:
    def __init__(self) -> None:
        self.cuda_event = next(_addresses)
        self.at = 0.0
        events[self.cuda_event] = self

    def record(self, stream: _Stream) -> None:
        self.at = max(_now(), stream.free)

    def query(self) -> bool:
        return _now() >= self.at

    def synchronize(self) -> None:
        _sleep_until(self.at)

    def elapsed_time(self, end: _Event) -> float:
        return (end.at - self.at) * 1e3


events: dict[int, _Event] = {}
streams: dict[int, _Stream] = {}


class _Side:
    def __init__(self, device: torch.device, priority: int = 0, context: object = None) -> None:
        self.stream = _Stream(device)
        self.address = self.stream.cuda_stream
        streams[self.address] = self.stream


@dataclass(eq=False)
class _Graph:
    seconds: Callable[[int], float]
    slots: int
    address: int = field(default_factory=lambda: next(_addresses))

    def __post_init__(self) -> None:
        graphs[self.address] = self

    def replay(self, stream: _Stream) -> None:
        stream.free = max(_now(), stream.free) + self.seconds(self.slots)


graphs: dict[int, _Graph] = {}


@dataclass(eq=False)
class _Native:
    timing: Timing

    def record(self, event: int, stream: int) -> None:
        work(3e-6)
        events[event].at = _now()

    def enqueue(
        self,
        stream: int,
        marks: list[int],
        start: int,
        table: int,
        host: int,
        size: int,
        graph: int,
        end: int,
        watched: list[Any],
    ) -> bool:
        work(self.timing.enqueue)
        on = streams[stream]
        for mark in marks:
            on.wait_event(events[mark])
        events[start].record(on)
        active = ctypes.c_int32.from_address(host).value
        on.free = events[start].at + graphs[graph].seconds(active)
        events[end].record(on)
        return any(map(compat.native.checks().changed, watched))

    def await_any(self, watched: list[int], seconds: float, flag: int) -> bool:
        end = _now() + seconds
        first = min(events[address].at for address in watched)
        while (left := min(first, end) - _now()) > 0.0:
            if flag and ctypes.c_int32.from_address(flag).value:
                return False
            time.sleep(min(left, 50e-6))
        return first <= end


class _Steps:
    """Kernels that are launched one by one."""

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self.lane: Lane | None = None

    def run(self, served: ServedProgram, layout: TableLayout, table: Tensor) -> None:
        burn(self._timing.launches)
        assert self.lane is not None
        on: Any = self.lane.stream
        on.free = max(_now(), on.free) + self._timing.bundle(served.program.name, layout.slots)

    def launches(self, served: ServedProgram, slots: int) -> list[Any]:
        return []


class _Capturer(Capturer):
    """Captures that only take time."""

    timing = Timing()
    captured: list[tuple[str, int, float]]

    def rehearse(self, served: ServedProgram, most: int) -> None:
        pass

    def _build(self, served: ServedProgram, sizes: Sequence[int]) -> None:
        pass

    def _capture(self, lane: Lane, served: ServedProgram, slots: int) -> Executable:
        begun, generation = _now(), self.generation(served)
        for _ in range(round(self.timing.capture / self.timing.piece)):
            burn(self.timing.piece)
            self._thread.breathe()
        self.captured.append((served.program.name, slots, begun))
        graph: Any = _Graph(partial(self.timing.bundle, served.program.name), slots)
        return Executable(graph, slots, generation)


class _NoMixes:
    def configure(self, settings: Settings) -> None:
        pass

    def reports(self) -> tuple[MixReport, ...]:
        return ()

    def forget(self, served: ServedProgram) -> None:
        pass


class SimulatedGpu(CudaExecutor):
    """The real executor over streams that only take time."""

    def __init__(self, engine: Engine, device: torch.device, timing: Timing) -> None:
        steps: Any = _Steps(timing)
        self.capturer = _Capturer(engine.compile_thread, steps, engine.compile_lock, Any)  # type: ignore[arg-type]
        self.capturer.timing, self.capturer.captured = timing, []
        self.timing = timing
        with mock.patch("torch.cuda.get_device_properties", return_value=_PROPERTIES):
            super().__init__(device, steps, self.capturer, lambda sms: _NoMixes(), engine.clock)  # type: ignore[arg-type, return-value]
        self.simulated_steps = steps

    def rehearse(self, served: ServedProgram) -> None:
        pass

    def launch(self, bundle: Any) -> Any:
        self.simulated_steps.lane = self._lanes.take(bundle.issue)
        return super().launch(bundle)


class _Storage:
    """Rows that are never written; staleness is found as lowering finds it."""

    def __init__(self) -> None:
        self.generation = 1
        self._rows: dict[int, Any] = {}

    def bind(self, parameters: Sequence[Tensor]) -> int:
        row = len(self._rows)
        checks = compat.native.checks()
        self._rows[row] = checks.weights(list(parameters), list(parameters))
        return row

    def refresh(self, row: int, parameters: Sequence[Tensor]) -> None:
        pass

    def stale(self, row: int) -> bool:
        return compat.native.checks().changed(self._rows[row])

    def watched(self, rows: Iterable[int]) -> list[Any]:
        return [self._rows[row] for row in rows]

    def release(self, row: int) -> None:
        pass

    def nbytes(self, row: int) -> int:
        return 1


class SimulatedPlan:
    """Plays the part of lowering's ``CompiledPlan``; answers are not computed."""

    coalesced = capturable = True
    small = from_disk = False
    max_slots, work, reasons, report = 1 << 20, 1, (), {"kernels": 1}

    def __init__(self, program: Program, settings: Settings) -> None:
        self.program = program
        self.storage = _Storage()

    def launches(self, slots: int) -> list[Any]:
        return []


@contextlib.contextmanager
def simulated_engine(
    timing: Timing, clock: Callable[[], float] = time.perf_counter, **settings: Any
) -> Iterator[tuple[Engine, list[SimulatedGpu]]]:
    """An engine whose devices are simulated, and these; all of them on one clock."""
    made: list[SimulatedGpu] = []
    own = threading.local()

    def current(device: torch.device) -> Any:
        if not hasattr(own, "stream"):
            own.stream = _Stream(device)
            streams[own.stream.cuda_stream] = own.stream
        return own.stream

    def make(engine: Engine, device: torch.device) -> SimulatedGpu:
        made.append(SimulatedGpu(engine, device, timing))
        return made[-1]

    native = _Native(timing)
    with contextlib.ExitStack() as stack:

        def patch(where: Any, name: str, what: Any) -> None:
            stack.enter_context(mock.patch.object(where, name, what))

        patch(lanes, "Side", _Side)
        patch(lanes, "new_event", lambda timing=False: _Event())
        patch(lanes, "passed", _Event.query)
        patch(cuda, "passed", _Event.query)
        patch(lanes.Lane, "measure_pool", lambda lane: hold(timing.snapshot))
        patch(compat.native, "enqueue", lambda: native)
        patch(compat, "is_current", lambda device: True)
        patch(compat, "is_capturing", lambda: False)
        patch(compat, "current_stream", current)
        patch(compat, "on_stream", lambda stream: contextlib.nullcontext())
        patch(compat, "guard_synchronize", lambda: None)
        _clocks.append(clock)
        stack.callback(_clocks.pop)
        plan: Any = SimulatedPlan
        engine = Engine(
            Settings(**{"pack": 1, **settings}),
            clock,
            compile_plan=plan,
            compile_lock=compat.compile_lock(),
            executor=make,
        )
        try:
            yield engine, made
        finally:
            engine.close()

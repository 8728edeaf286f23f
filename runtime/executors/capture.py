"""The steps of a coalesced bundle on CUDA: made ready, launched as they are or captured once into a graph."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol
from weakref import ref

import torch
from torch import Tensor

from torch_mux import compat
from torch_mux.lowering.kernels.ahead import FIRST_SIZES, Builder
from torch_mux.lowering.kernels.interception import Work, intercepted, recording
from torch_mux.runtime.compile_thread import CompileThread, Rank
from torch_mux.runtime.executors.base import Stack
from torch_mux.runtime.executors.cover import worth_waiting
from torch_mux.runtime.executors.segmenter import Segmenter, cut
from torch_mux.runtime.lanes import Executable, Lane, Side
from torch_mux.runtime.ring import RingEntry, TableLayout
from torch_mux.runtime.served import ServedProgram
from torch_mux.settings import Settings
from torch_mux.types import TensorSpec

if TYPE_CHECKING:
    from torch_mux.lowering.kernels.code import Buildable

__all__ = ["Capturer", "Move", "Steps", "idle_table"]

logger = logging.getLogger(__name__)

_TRIES = 3
#: Bundles of a size that other graphs serve, after which it is worth a graph of its own.
_OFTEN = 64
#: Number of a lane, slots, generation of its graphs.
_Wish = tuple[int, int, Hashable]


@dataclass
class _Served:
    """A size that other graphs serve."""

    lane: ref[Lane]
    bundles: int = 0


class Move(Protocol):
    """A copy between the slots of a batched tensor and tensors given by address."""

    def __call__(self, first: Tensor, second: Tensor, control: Tensor, strides: Sequence[int], /) -> object:
        """Enqueues it on the current stream."""
        ...


class Steps:
    """gather → plan → scatter over one lane's table.

    Args:
        stack: ``stack_buffer`` of lowering.
        gather, scatter: the transport kernels of lowering.
    """

    def __init__(self, stack: Stack, gather: Move, scatter: Move) -> None:
        self._stack = stack
        self._gather = gather
        self._scatter = scatter

    def run(self, served: ServedProgram, layout: TableLayout, table: Tensor) -> None:
        """Enqueues the steps on the current stream; ``table`` is on the device."""
        program = served.program
        control, of_all = layout.control(table), layout.control_of_all(table)
        batched: list[Tensor] = []
        for spec in program.inputs:
            if spec is not None:
                buffer = self._stack(spec, layout.slots)
                self._gather(layout.input(table, len(batched)), buffer, of_all, spec.strides)
                batched.append(buffer)
        results = served.compiled.run(layout.rows(table), control, batched)
        specs = [spec for spec in program.outputs if spec is not None]
        for index, (spec, result) in enumerate(zip(specs, results, strict=True)):
            self._scatter(result, layout.output(table, index), control, spec.strides)

    def launches(self, served: ServedProgram, slots: int) -> list[Buildable]:
        """The super-kernels that :meth:`run` launches for ``slots`` slots, found without the device."""
        program = served.program
        layout = TableLayout.of(program, slots)
        inputs = [spec for spec in program.inputs if spec is not None]
        outputs = [spec for spec in program.outputs if spec is not None]
        with compat.fake_tensors(), torch.no_grad(), recording() as found:
            table = torch.empty(layout.words, dtype=torch.int64, device=program.device)
            control = layout.control(table)
            for index, spec in enumerate(inputs):
                self._gather(layout.input(table, index), self._stack(spec, slots), control, spec.strides)
            for index, spec in enumerate(outputs):
                self._scatter(self._stack(spec, slots), layout.output(table, index), control, spec.strides)
        return [*found, *served.compiled.launches(slots)]


class Capturer:
    """Captures graphs on the compile thread, each size of each program once a lane and generation.

    A size that no captured graphs serve well is captured at once; another when it has come often, or when
    somebody waits for quiet.

    Args:
        compile_lock: held while Inductor's kernels may be compiled.
        builder: compiles super-kernels.
        segmenter: cuts what is captured; None: nothing is cut.
    """

    def __init__(
        self,
        thread: CompileThread,
        steps: Steps,
        compile_lock: contextlib.AbstractContextManager[object],
        builder: Builder,
        segmenter: Segmenter | None = None,
    ) -> None:
        self._thread = thread
        self._steps = steps
        self._compile_lock = compile_lock
        self._builder = builder
        self._lock = threading.Lock()
        self._sides: dict[torch.device, Side] = {}
        self._rehearsed: set[ServedProgram] = set()
        self._segmenter = segmenter
        self._wanted: dict[ServedProgram, set[_Wish]] = {}
        self._served: dict[ServedProgram, dict[_Wish, _Served]] = {}
        self._built: dict[ServedProgram, set[int]] = {}
        thread.holds_back(self.want_served)
        self._failures: dict[ServedProgram, list[str]] = {}

    def configure(self, settings: Settings) -> None:
        """Takes over new settings; graphs that would be others under them are captured again."""
        if self._segmenter is not None:
            self._segmenter.configure(settings)

    def generation(self, served: ServedProgram) -> Hashable:
        """Of the graphs that may be used now: where the tables are, and how plans are cut."""
        stamp = None if self._segmenter is None else self._segmenter.stamp
        return served.storage.generation, stamp

    def jobs(self) -> int:
        """What :meth:`worked_since` compares with."""
        return self._thread.ends

    def worked_since(self, jobs: int) -> bool:
        """Whether something was compiled or captured since :meth:`jobs` said so, perhaps on the device."""
        return bool(jobs % 2) or self._thread.ends != jobs

    def graphs(self, lane: Lane, served: ServedProgram, slots: int) -> tuple[Executable, ...]:
        """The graphs that serve a bundle one after another; unless it is one of its size, that is wanted."""
        found = lane.executables_for(served.key, slots, self.generation(served))
        if len(found) == 1 and found[0].slots == slots:
            return found
        if sum([served.layouts.of(one.slots).words for one in found]) > lane.words():
            found = ()
        self.want(lane, served, slots, fits=_serve(found, slots))
        return found

    def want(self, lane: Lane, served: ServedProgram, slots: int, fits: bool) -> None:
        """A bundle of a size without a graph; asked for again, or after a failure, nothing happens.

        Args:
            fits: whether graphs of other sizes serve it well enough.
        """
        wish = (lane.number, slots, self.generation(served))
        with self._lock:
            wishes = self._wanted.setdefault(served, set())
            if wish in wishes:
                return
            if fits:
                found = self._served.setdefault(served, {}).setdefault(wish, _Served(ref(lane)))
                found.bundles += 1
                if found.bundles < _OFTEN:
                    return
            wishes.add(wish)
        self._submit(lane, served, slots, Rank.SPARE if fits else Rank.WANTED)

    def want_served(self) -> None:
        """Has all sizes captured that came and that other graphs serve."""
        found: list[tuple[Lane, ServedProgram, int]] = []
        with self._lock:
            for served, sizes in self._served.items():
                wishes = self._wanted.setdefault(served, set())
                for wish, one in sizes.items():
                    lane = one.lane()
                    if lane is not None and wish not in wishes and wish[2] == self.generation(served):
                        wishes.add(wish)
                        found.append((lane, served, wish[1]))
            self._served.clear()
        for lane, served, slots in found:
            self._submit(lane, served, slots, Rank.SPARE)

    def _submit(self, lane: Lane, served: ServedProgram, slots: int, rank: Rank) -> None:
        self._thread.submit(lambda: self._attempt(lane, served, slots, rank), rank)

    def failures(self, served: ServedProgram) -> tuple[str, ...]:
        """Why sizes of a program could not be captured."""
        with self._lock:
            return tuple(self._failures.get(served, ()))

    def forget(self, served: ServedProgram) -> None:
        """Drops what is known of a program."""
        with self._lock:
            self._rehearsed.discard(served)
            self._wanted.pop(served, None)
            self._served.pop(served, None)
            self._built.pop(served, None)
            self._failures.pop(served, None)

    def rehearse(self, served: ServedProgram, most: int) -> None:
        """Has the kernels of a new plan ready at the first sizes, and later at all others up to ``most``.

        It runs once: what is not a super-kernel is the same code at every size. A plan with segments that run
        per instance reads the rows of instances there are, so that it has no rehearsal.
        """
        self._build(served, FIRST_SIZES)
        device = served.program.device
        if served.compiled.capturable:
            with (
                self._compile_lock,
                torch.cuda.device(device),
                torch.cuda.stream(self._side(device)),
                torch.inference_mode(),
            ):
                self._rehearse(served, TableLayout.of(served.program, FIRST_SIZES[0]))
        with self._lock:
            self._rehearsed.add(served)
        self._build_later(served, _likely_first(most))

    def _build(self, served: ServedProgram, sizes: Sequence[int]) -> None:
        with self._lock:
            built = self._built.get(served, set())
        sizes = [slots for slots in sizes if slots not in built]
        with self._compile_lock:
            launches = [launch for slots in sizes for launch in self._steps.launches(served, slots)]
        self._builder.finish(launches)
        self._note_built(served, sizes)

    def _note_built(self, served: ServedProgram, sizes: Sequence[int]) -> None:
        with self._lock:
            self._built.setdefault(served, set()).update(sizes)

    def _build_later(self, served: ServedProgram, sizes: Sequence[int]) -> None:
        """One size a job, so that captures and new plans go first."""

        def job() -> None:
            with self._lock:
                if served not in self._rehearsed:
                    return
            with self._compile_lock:
                launches = self._steps.launches(served, sizes[0])
            # One after another: many compiling threads would take the interpreter from those who serve.
            while launches:
                count = len(launches) if self._thread.hurried else 1
                self._builder.finish(launches[:count])
                launches = launches[count:]
            self._note_built(served, sizes[:1])
            self._build_later(served, sizes[1:])

        if sizes:
            self._thread.submit(job, Rank.AHEAD)

    def _attempt(self, lane: Lane, served: ServedProgram, slots: int, rank: Rank) -> None:
        generation = self.generation(served)
        with self._lock:
            if served not in self._wanted:
                return
            found = lane.executables_for(served.key, slots, generation)
            if rank is Rank.WANTED and _serve(found, slots):
                # Another size that was asked for before serves it now.
                self._wanted[served].discard((lane.number, slots, generation))
                return
        executable: Executable | None = None
        for left in reversed(range(_TRIES)):
            try:
                self._build(served, (slots,))
                with self._compile_lock:
                    executable = self._capture(lane, served, slots)
                break
            except Exception as error:
                self._failed(served, slots, error, left)
        if executable is None:
            return
        with self._lock:
            if served in self._wanted:
                lane.add(served.key, executable)
        lane.measure_pool()
        served.memory_changed()
        logger.debug("captured %s for %d slots on lane %d", served.program.name, slots, lane.index)

    def _failed(self, served: ServedProgram, slots: int, error: Exception, left: int) -> None:
        """Another thread's use of the device can end a capture, so there are several tries."""
        name = served.program.name
        if left:
            logger.info("capturing %s for %d slots failed and is tried again: %s", name, slots, error)
            return
        logger.error("capturing %s for %d slots failed; it stays uncaptured", name, slots, exc_info=error)
        with self._lock:
            reasons = self._failures.setdefault(served, [])
            reasons.append(f"{slots} slots: {type(error).__name__}: {error}")

    def _capture(self, lane: Lane, served: ServedProgram, slots: int) -> Executable:
        # Before anything that settings decide or that tables are: where they move meanwhile, the graph is of
        # no use, and nobody waits for it with his new row.
        generation = self.generation(served)
        device = served.program.device
        layout = TableLayout.of(served.program, slots)
        side = self._side(device)
        with torch.cuda.device(device), torch.inference_mode():
            if lane.pool is None:
                lane.pool = compat.Pool(device)
            with torch.cuda.stream(side):
                self._rehearse(served, layout)
                if self._segmenter is not None:
                    self._segmenter.prepare()
                side.synchronize()
            segments = 1

            def run() -> None:
                nonlocal segments
                table = lane.ring.table
                with cut(self._segmenter, lane.kind, layout, table) as found:
                    self._steps.run(served, layout, table)
                segments = 1 if found is None else max(1, found.count)

            with torch.cuda.stream(lane.recorder), compat.capturing(), intercepted(self._breathing):
                graph = compat.captured(run, lane.pool)
        return Executable(graph, slots, generation, segments)

    def _side(self, device: torch.device) -> torch.cuda.Stream:
        """Where the compile thread runs what it rehearses."""
        if device not in self._sides:
            self._sides[device] = Side(device)
        return self._sides[device].stream

    def _rehearse(self, served: ServedProgram, layout: TableLayout) -> None:
        """Runs the steps once on zeros with no slot active, so that capturing compiles and loads nothing."""
        table, kept = idle_table(served, layout)
        with intercepted(self._breathing):
            self._steps.run(served, layout, table)
        torch.cuda.current_stream(served.program.device).synchronize()
        del kept

    def _breathing(self, work: Work) -> Work:
        """Between two launches."""
        self._thread.breathe()
        return work


def _serve(found: Sequence[Executable], slots: int) -> bool:
    """Whether these graphs serve so many slots well enough."""
    return worth_waiting(slots, tuple([one.slots for one in found]))


def idle_table(served: ServedProgram, layout: TableLayout) -> tuple[Tensor, object]:
    """A table on the device with no slot active, written on the current stream, and what it points to."""
    program = served.program

    def zeros(spec: TensorSpec) -> Tensor:
        return torch.empty_strided(spec.shape, spec.strides, dtype=spec.dtype, device=spec.device).zero_()

    inputs = [[zeros(spec)] for spec in program.inputs if spec is not None]
    outputs = [[zeros(spec)] for spec in program.outputs if spec is not None]
    entry = RingEntry(layout.words, pinned=False)
    entry.fill(layout, [0], 1, inputs, outputs)
    entry.deactivate()
    return entry.host.to(program.device), (inputs, outputs)


def _likely_first(most: int) -> list[int]:
    """The sizes up to ``most`` for which nothing was made ready yet: powers of two, then the rest."""
    rest = [size for size in range(1, most + 1) if size not in FIRST_SIZES]
    return sorted(rest, key=lambda size: (size & (size - 1) != 0, size))

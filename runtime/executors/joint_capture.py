"""Graphs of several programs' bundles, captured on the compile thread by a schedule of their launches."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from torch_mux import compat
from torch_mux.lowering import kept
from torch_mux.lowering.kernels.ahead import Builder
from torch_mux.lowering.kernels.interception import Turn, Work, left_while_handed
from torch_mux.lowering.pack.costs import capped_grid
from torch_mux.lowering.pack.kept import schedule_of
from torch_mux.lowering.pack.schedule import Schedule
from torch_mux.runtime import verdicts
from torch_mux.runtime.compile_thread import CompileThread, Rank
from torch_mux.runtime.executors.capture import Steps, idle_table
from torch_mux.runtime.executors.segmenter import Segmenter, cut_members
from torch_mux.runtime.lanes import Lane, Side
from torch_mux.runtime.mixes import Mix, MixBook, MixState
from torch_mux.runtime.ring import TableLayout
from torch_mux.runtime.served import ServedProgram
from torch_mux.runtime.steppers import Stepper
from torch_mux.runtime.weave import Issuer, observed, weave
from torch_mux.settings import Settings

if TYPE_CHECKING:
    from torch_mux.lowering.kernels.common import Launch

__all__ = ["JointCapturer", "JointExecutable", "Member", "StreamIssuer"]

log = logging.getLogger(__name__)

_TRIES: Final = 3

#: A program with the slots that its part of the table has.
Member = tuple[ServedProgram, int]


@dataclass(frozen=True, eq=False)
class JointExecutable:
    """A captured graph of several programs over one table.

    Attributes:
        graph: the captured graph.
        layouts: each member's part of the table.
        starts: where these begin, in words.
        generations: of each member's storage; tables that moved since make it invalid.
    """

    graph: compat.Graph
    layouts: tuple[TableLayout, ...]
    starts: tuple[int, ...]
    generations: tuple[int, ...]

    @property
    def words(self) -> int:
        """Words of the whole table."""
        return self.starts[-1] + self.layouts[-1].words


class StreamIssuer:
    """An ``Issuer`` that puts each member's launches on a stream of his own, and matched ones on the first's.

    A launch that follows a matched one on another stream has two predecessors, and so is no dependent launch.
    """

    def __init__(self, streams: Sequence[torch.cuda.Stream]) -> None:
        self._streams = streams
        self._joined: set[int] = set()

    def __call__(
        self, members: Sequence[int], works: Sequence[Work], sms: int, beside: bool
    ) -> Sequence[Work | None]:
        """See ``Issuer``."""
        if any(isinstance(work, Turn) for work in works):
            raise TypeError("a turn of the CPU cannot be launched")
        launches = [cast("Launch", work) for work in works]
        if len(launches) == 1:
            plain = members[0] in self._joined
            self._joined.discard(members[0])
            return [_within(replace(launches[0], plain=True) if plain else launches[0], sms, beside)]
        lead, *others = (self._streams[member] for member in members)
        for stream in others:
            lead.wait_stream(stream)
        with torch.cuda.stream(lead):
            _within(_joint(launches), sms, beside).start()
        for stream in others:
            stream.wait_stream(lead)
        self._joined.update(members[1:])
        return [None] * len(members)


@contextlib.contextmanager
def _forked(trunk: torch.cuda.Stream, branches: Sequence[torch.cuda.Stream]) -> Iterator[StreamIssuer]:
    """The branches begin behind the trunk, and the trunk goes on behind them."""
    with torch.cuda.stream(trunk):
        for stream in branches:
            stream.wait_stream(trunk)
        yield StreamIssuer(branches)
        for stream in branches:
            trunk.wait_stream(stream)


def _joint(launches: Sequence[Launch]) -> Launch:
    from torch_mux.lowering.kernels.joint_launches import joint_launch

    return joint_launch(launches)


def _tiles_may_change(device: torch.device) -> bool:
    from torch_mux.lowering.kernels.common import settled

    return settled(device)


def _within(launch: Launch, sms: int, beside: bool) -> Launch:
    """The launch, kept to ``sms`` multiprocessors where others run beside it."""
    if not beside:
        return launch
    return replace(launch, grid=capped_grid(launch.operation, launch.tile, launch.grid, sms))


class JointCapturer:
    """Captures mixes, each once a lane, and again when the tables have moved.

    Args:
        compile_lock: held while Inductor's kernels may be compiled.
        builder: compiles super-kernels.
        book: the mixes of the device.
        segmenter: cuts what is captured; None: nothing is cut.
    """

    def __init__(
        self,
        thread: CompileThread,
        steps: Steps,
        compile_lock: contextlib.AbstractContextManager[object],
        builder: Builder,
        book: MixBook,
        segmenter: Segmenter | None = None,
    ) -> None:
        self._thread = thread
        self._steps = steps
        self._compile_lock = compile_lock
        self._builder = builder
        self._book = book
        self._segmenter = segmenter
        self._segment: float | None = None
        self._match = self._keep = True
        self._trunk: Side | None = None
        self._recorders: WeakKeyDictionary[Lane, list[Side]] = WeakKeyDictionary()
        self._steppers: list[Stepper] = []

    def configure(self, settings: Settings) -> None:
        """Takes over new settings; what was built under others is forgotten."""
        self._keep = settings.keep_plans
        if (settings.match, settings.segment) != (self._match, self._segment):
            self._match, self._segment = settings.match, settings.segment
            self._book.clear()

    def want(self, lane: Lane, mix: Mix, members: Sequence[Member]) -> None:
        """Asks for the graph of a mix on a lane."""
        mix.state = MixState.BUILDING
        self._thread.submit(lambda: self._attempt(lane, mix, members), Rank.SPARE)

    def decided(self, mix: Mix) -> None:
        """It is known which way a mix is faster: kept for later processes."""
        if self._keep:
            self._thread.submit(lambda: verdicts.write(self._name(mix), mix.verdict), Rank.SPARE)

    def _name(self, mix: Mix) -> str:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        return kept.digest_of("mix", mix.key, device, torch.__version__, self._match)

    def _slower(self, mix: Mix) -> bool:
        """Whether an earlier process found that the mix is faster as its programs' own plans."""
        found = verdicts.read(self._name(mix)) if self._keep and self._book.after > 0.0 else None
        if found is None or found.joint:
            return False
        mix.verdict, mix.state = found, MixState.SLOWER
        return True

    def _attempt(self, lane: Lane, mix: Mix, members: Sequence[Member]) -> None:
        """Another thread's use of the device can end a capture, so there are several tries."""
        names = ", ".join(mix.names)
        if self._slower(mix):
            return
        for left in reversed(range(_TRIES)):
            if not self._book.knows(mix):
                return
            try:
                executable = self._made(lane, mix, members)
                break
            except Exception as error:
                if left:
                    log.info("capturing the mix of %s failed and is tried again: %s", names, error)
                    continue
                log.error("the mix of %s stays uncaptured", names, exc_info=error)
                mix.failed(error)
                return
        mix.executables[lane] = executable
        mix.state = MixState.READY
        lane.measure_pool()
        for served, _ in members:
            served.memory_changed()
        log.debug("captured the mix of %s on lane %d", names, lane.index)

    def _made(self, lane: Lane, mix: Mix, members: Sequence[Member]) -> JointExecutable:
        layouts = [TableLayout.of(served.program, slots) for served, slots in members]
        device = members[0][0].program.device
        with self._compile_lock:
            launches = [each for served, slots in members for each in self._steps.launches(served, slots)]
        self._builder.finish(launches)
        with self._compile_lock, torch.cuda.device(device), torch.inference_mode():
            self._grow(device, len(members))
            schedule = self._rehearsed(mix, members, layouts, device)
            return self._capture(lane, members, layouts, schedule)

    def _breathing(self, issue: Issuer) -> Issuer:
        """The same issuer, which leaves the interpreter to others between two steps."""

        def step(
            members: Sequence[int], works: Sequence[Work], sms: int, beside: bool, /
        ) -> Sequence[Work | None]:
            self._thread.breathe()
            return issue(members, works, sms, beside)

        return step

    def _grow(self, device: torch.device, members: int) -> None:
        if self._trunk is None:
            self._trunk = Side(device)
        while len(self._steppers) < members:
            self._steppers.append(Stepper(f"torch_mux-member-{len(self._steppers)}"))

    def _bodies(
        self,
        members: Sequence[Member],
        layouts: Sequence[TableLayout],
        tables: Sequence[Tensor],
        sides: Sequence[Side],
        pool: compat.Pool | None = None,
    ) -> list[Callable[[], None]]:
        """What each member does on his stream; with a pool, allocating from it while it is his turn."""

        def run(served: ServedProgram, layout: TableLayout, table: Tensor, stream: torch.cuda.Stream) -> None:
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.cuda.device(stream.device))
                stack.enter_context(torch.cuda.stream(stream))
                stack.enter_context(torch.inference_mode())
                if pool is not None:
                    stack.enter_context(left_while_handed(pool.allocating))
                self._steps.run(served, layout, table)

        parts = zip(members, layouts, tables, sides, strict=False)
        return [
            partial(run, served, layout, table, side.stream) for (served, _), layout, table, side in parts
        ]

    def _rehearsed(
        self, mix: Mix, members: Sequence[Member], layouts: Sequence[TableLayout], device: torch.device
    ) -> Schedule:
        """Runs every member once by himself and once by the schedule, with no slot active.

        What is launched is seen so; after it, capturing compiles and loads nothing. All of it is on one
        stream: torch has few, and nothing has to overlap here.
        """
        assert self._trunk is not None
        sides = [self._trunk] * len(members)
        with torch.cuda.stream(self._trunk.stream):
            if self._segmenter is not None:
                self._segmenter.prepare()
            idle = [idle_table(served, layout) for (served, _), layout in zip(members, layouts, strict=True)]
        self._trunk.stream.synchronize()
        bodies = self._bodies(members, layouts, [table for table, _ in idle], sides)
        seen = [observed(body, stepper) for body, stepper in zip(bodies, self._steppers, strict=False)]
        operations = [[work.operation for work in works] for works in seen]
        sms = torch.cuda.get_device_properties(device).multi_processor_count
        match = self._match and _tiles_may_change(device)
        schedule = mix.schedule
        if schedule is None or list(map(list, schedule.members)) != operations:
            breathe = self._thread.breathe
            schedule = schedule_of(operations, sms, match=match, keep=self._keep, pause=breathe)
            mix.schedule = schedule
        self._builder.finish(_variants(schedule, cast("list[list[Launch]]", seen)))
        self._trunk.stream.synchronize()
        del seen
        with torch.cuda.stream(self._trunk.stream):
            issuer = StreamIssuer([side.stream for side in sides])
            weave(self._steppers, bodies, schedule, self._breathing(issuer))
        self._trunk.stream.synchronize()
        return schedule

    def _capture(
        self, lane: Lane, members: Sequence[Member], layouts: Sequence[TableLayout], schedule: Schedule
    ) -> JointExecutable:
        generations = tuple(served.storage.generation for served, _ in members)  # before tables are read
        starts = [sum(layout.words for layout in layouts[:index]) for index in range(len(layouts))]
        tables = [
            lane.ring.table[start : start + layout.words]
            for start, layout in zip(starts, layouts, strict=True)
        ]
        if lane.pool is None:
            lane.pool = compat.Pool(lane.stream.device)
        sides = self._recorders.setdefault(lane, [])
        while len(sides) < len(members):  # as a lane's recorder, for the same reasons
            sides.append(Side(lane.stream.device, context=lane.context))
        bodies = self._bodies(members, layouts, tables, sides, lane.pool)
        branches = [side.stream for side in sides[: len(members)]]

        def run() -> None:
            with _forked(lane.recorder, branches) as issuer:
                cutting = cut_members(self._segmenter, issuer, layouts, tables, branches)
                weave(self._steppers, bodies, schedule, self._breathing(cutting))

        with compat.capturing(), torch.cuda.stream(lane.recorder):
            graph = compat.captured(run, lane.pool, allocating=False)
        return JointExecutable(graph, tuple(layouts), tuple(starts), generations)


def _variants(schedule: Schedule, seen: Sequence[Sequence[Launch]]) -> list[Launch]:
    """Launches of a schedule that no member makes by himself: matched ones, and those that follow them."""
    found: list[Launch] = []
    joined: set[int] = set()
    for word in schedule.words:
        for step in (step for strand in word.strands for step in strand.steps):
            launches = [seen[member][index] for member, index in step]
            if len(launches) > 1:
                found.append(_joint(launches))
                joined.update(member for member, _ in step[1:])
            elif step[0][0] in joined:
                joined.discard(step[0][0])
                found.append(replace(launches[0], plain=True))
    return found

"""The CUDA executor: bundles on lanes, replayed from captured graphs that read nothing but tables."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Final, cast

import torch
from torch import Tensor

from torch_mux import compat
from torch_mux.errors import DeviceFailed, StreamCaptured
from torch_mux.lowering.program import Program
from torch_mux.runtime.bundle import Bundle
from torch_mux.runtime.executors.base import (
    ExecutorReport,
    Flight,
    bound_rows,
    plain_context,
    renewed,
    run_each_alone,
    written_rows,
)
from torch_mux.runtime.executors.capture import Capturer, Steps
from torch_mux.runtime.executors.device_clock import DeviceClock
from torch_mux.runtime.executors.joint import JointLauncher
from torch_mux.runtime.executors.lane_set import LaneSet
from torch_mux.runtime.executors.parts import enqueue_natively, filled
from torch_mux.runtime.interrupt import Interrupt
from torch_mux.runtime.lanes import CudaFlight, Executable, Lane, Mark, Marks, marks_of, passed
from torch_mux.runtime.mixes import MixReport
from torch_mux.runtime.request import Request
from torch_mux.runtime.ring import TableLayout
from torch_mux.runtime.scheduler.base import Issue, LaneLoad, QueueName
from torch_mux.runtime.served import ServedProgram, failure
from torch_mux.settings import Settings

__all__ = ["CudaExecutor"]

logger = logging.getLogger(__name__)

#: Of a lane: as many programs' bundles overlap.
BRANCHES: Final = 4
#: Seconds between two looks at the lanes, and for which those that are looked at stay the same.
_GLANCE, _LOOK, _ATTEMPTS = 100e-6, 1e-3, 3
#: How many times what the host takes to enqueue it a bundle takes that does not wait for it.
_HOSTED: Final = 2.0


class CudaExecutor:
    """One GPU.

    A coalesced bundle is a row of addresses in a pinned ring, one copy to the lane's table and one graph
    replay: one native call where every row is written and the graph is there. Until a graph of its size is
    captured, the same kernels are launched one by one. Whether weights changed is checked while the device is
    already at work; a bundle that read an old row is enqueued again before anybody is told.
    """

    def __init__(
        self,
        device: torch.device,
        steps: Steps,
        capturer: Capturer,
        joint: Callable[[int], JointLauncher],
        clock: Callable[[], float],
    ) -> None:
        self.device = device
        self.sms = torch.cuda.get_device_properties(device).multi_processor_count
        self.fault: Exception | None = None
        self._steps = steps
        self._capturer = capturer
        self._joint = joint(self.sms)
        self.together, self.asynchronous = 1, True
        self._clock = clock
        self._times = DeviceClock()
        self._lanes = LaneSet(device)
        self._marks = Marks()
        self._capture, self._most = True, 1
        compat.guard_synchronize()

    def configure(self, settings: Settings) -> None:
        """From the next bundle on lanes are those of ``settings``."""
        self._lanes.configure(settings, BRANCHES if settings.branches is None else settings.branches)
        self._capturer.configure(settings)
        self._capture = settings.capture
        self._most = settings.max_bundle
        self.together = 8 if settings.pack is None else settings.pack
        self._joint.configure(settings)

    def slots(self, program: Program) -> int:
        """As many as a lane's table has room for."""
        sections = TableLayout.of(program, 1)
        return max(1, (Lane.words() - 4) // (1 + sections.inputs + sections.outputs) - 1)

    def rehearse(self, served: ServedProgram) -> None:
        """Has the kernels of a new plan compiled and loaded before anybody waits for them."""
        most = min(self._most, served.compiled.max_slots, self.slots(served.program))
        self._capturer.rehearse(served, most)

    def loads(self) -> Sequence[LaneLoad]:
        """Bundles under way on each lane in use."""
        return self._lanes.loads()

    def mark(self) -> object:
        """An event on the caller's current stream."""
        if compat.is_capturing():
            raise StreamCaptured
        stream = compat.current_stream(self.device)
        mark = self._marks.take(stream)
        try:
            mark.record(stream)
        except Exception as error:
            self._examine(error)
            raise DeviceFailed(device=self.device, fault=error) from error
        return mark

    def launch(self, bundle: Bundle) -> Flight | None:
        """Enqueues the bundle on its lane, or on another one for as long as that has no graphs for it."""
        home = self._lanes.take(bundle.issue)
        lane = home if len(self._lanes) == 1 else self._with_graphs(home, bundle)
        flight = lane.flight(bundle, self._clock(), self._lanes.predecessors(lane, home, bundle.issue))
        flight.jobs = self._capturer.jobs()
        marks = marks_of(bundle.requests) + [other.end for other in flight.after]
        try:
            if not self._at_once(lane, flight, marks):
                with compat.on_stream(lane.stream), plain_context("cuda"):
                    self._enqueue_flight(lane, flight, marks)
        except BaseException as error:
            self._examine(error)
            if self.fault is None:
                # What was enqueued before it failed reads inputs and writes outputs that are let go of now.
                lane.stream.synchronize()
            raise
        for request in bundle.requests:
            request.flight = flight
        lane.flights.append(flight)
        if lane is not home:
            home.guests.append(flight)
        return flight

    def _with_graphs(self, home: Lane, bundle: Bundle) -> Lane:
        """Where it need not be launched one by one, which would keep everybody waiting; else its own lane."""
        served, slots = bundle.served, len(bundle.requests)
        generation = self._capturer.generation(served)
        if home.executable(served.key, slots, generation) is not None or served.ordered or not self._capture:
            return home
        if not served.active.coalesced or written_rows(bundle) is None or self._executables(home, bundle):
            return home
        return self._lanes.instead(home, lambda one: one.executables_for(served.key, slots, generation))

    def packs(self, served: ServedProgram) -> bool:
        """Whether bundles of a program may be part of a mix: those that are captured."""
        return self._capture and served.compiled.capturable

    def launch_together(self, bundles: Sequence[Bundle]) -> Sequence[Flight] | None:
        """Enqueues bundles of several programs as one, where the graph of the mix is there.

        It goes on one lane, behind what is under way on those of its programs.
        """
        homes = {bundle: self._lanes.take(bundle.issue) for bundle in bundles}
        lane = self._mixed(bundles[0].issue)
        away = {id(home): home for home in homes.values() if home is not lane}.values()
        after = [flight for home in away for flight in home.last if flight not in lane.flights]
        try:
            flights, unchanged = self._joint.launch(lane, bundles, self._clock(), after) or (None, True)
            if not unchanged:
                self._again_if_stale(lane, flights or ())
        except BaseException as error:
            self._examine(error)
            if self.fault is None:
                lane.stream.synchronize()
            raise
        for flight in flights or ():
            for request in flight.bundle.requests:
                request.flight = flight
            lane.flights.append(flight)
            if homes[flight.bundle] is not lane:
                homes[flight.bundle].guests.append(flight)
        return flights

    def _mixed(self, issue: Issue) -> Lane:
        """Where a mix goes: on the first common lane if its lanes are branches."""
        return self._lanes.take(issue) if issue.branch is None else self._lanes.first()

    def _again_if_stale(self, lane: Lane, flights: Sequence[CudaFlight]) -> None:
        """Members that read an old row are enqueued again, by themselves, before anybody is told."""
        old = [flight for flight in flights if renewed(flight.bundle)]
        if old:
            with compat.on_stream(lane.stream), plain_context("cuda"):
                for flight in old:
                    flight.kept = (flight.kept, self._coalesced(lane, flight))
                old[0].end.event.record(lane.stream)

    def mixes(self) -> Sequence[MixReport]:
        """The mixes that went out."""
        return self._joint.reports()

    def _at_once(self, lane: Lane, flight: CudaFlight, marks: Sequence[Mark]) -> bool:
        """Enqueues a captured bundle whose rows are all written; False where there is more to do."""
        native, bundle = compat.native.enqueue(), flight.bundle
        if native is None or not bundle.served.active.coalesced or not compat.is_current(self.device):
            return False
        rows = written_rows(bundle)
        executables = self._executables(lane, bundle) if rows is not None else ()
        if rows is None or not executables:
            return False
        entry, parts = filled(lane, flight, rows, executables, self.sms)
        known = bundle.served.storage.watched(set(rows))
        changed = enqueue_natively(native, lane, flight, marks, entry, parts, known or [])
        flight.kept = (*[request.instance.held for request in bundle.requests], executables, entry, marks)
        return (known is not None and not changed) or not renewed(bundle)

    def _enqueue_flight(self, lane: Lane, flight: CudaFlight, marks: Sequence[Mark]) -> None:
        bundle = flight.bundle
        for mark in marks:
            lane.stream.wait_event(mark.event)
        begun = self._clock()
        flight.start.event.record(lane.stream)
        if bundle.served.active.coalesced:
            flight.kept = (flight.kept, self._coalesced(lane, flight))
        else:
            run_each_alone(bundle)
            flight.kept = tuple(request.instance.current() for request in bundle.requests)
        flight.end.event.record(lane.stream)
        flight.host = self._clock() - begun

    def _coalesced(self, lane: Lane, flight: CudaFlight) -> tuple[object, ...]:
        bundle, written = flight.bundle, False
        kept: list[object] = []

        def before(new: bool) -> None:
            nonlocal written
            written = True
            self._settle(lane, bundle.served, new)

        for _ in range(_ATTEMPTS):
            rows = bound_rows(bundle, verify=False, before=before)
            kept.extend(request.instance.held for request in bundle.requests)
            with torch.inference_mode():
                kept.append(self._enqueue(lane, flight, rows))
            if not renewed(bundle):
                break
        if written:
            flight.way = None
        return tuple(kept)

    def _settle(self, lane: Lane, served: ServedProgram, new: bool) -> None:
        """Waits until nothing reads what is about to be written.

        That is all of the program's tables, which a new row may move, or one row, which is in order on the
        lane itself.
        """
        for other in self._lanes:
            if new or other is not lane:
                for flight in other.flights:
                    if flight.bundle.served is served:
                        flight.end.wait()

    def _executables(self, lane: Lane, bundle: Bundle) -> tuple[Executable, ...]:
        """The captured graphs to use, one after another."""
        if not (self._capture and bundle.served.compiled.capturable):
            return ()
        return self._capturer.graphs(lane, bundle.served, len(bundle.requests))

    def _enqueue(self, lane: Lane, flight: CudaFlight, rows: list[int]) -> object:
        executables = self._executables(lane, flight.bundle)
        entry, parts = filled(lane, flight, rows, executables, self.sms)
        for part in parts:
            lane.ring.send(entry, part.layout.words, part.start)
            if part.executable is None:
                self._steps.run(flight.bundle.served, part.layout, lane.ring.table)
            else:
                part.executable.graph.replay(lane.stream)
        return executables

    def reap(self) -> Sequence[Flight]:
        """The flights that ended, with their device seconds."""
        landed: list[Flight] = []
        while True:
            known = len(landed)
            for lane in self._lanes:
                while lane.flights and self._ended(lane.flights[0]):
                    landed.append(lane.flights.popleft())
            if len(landed) == known or len(self._lanes) == 1:
                return landed

    def _ended(self, flight: CudaFlight) -> bool:
        now = self._clock()
        try:
            if [other for other in flight.after if not other.finished]:
                return False
            if not (self._times.known(flight.end) or passed(flight.end.event)):
                return False
            flight.ended, flight.seconds = self._times.ended(flight.start, flight.end, flight.launched, now)
        except Exception as error:
            self._examine(error)
            flight.error = failure(flight.bundle.served, error)
            flight.ended = now
        flight.finished = True
        flight.kept = flight.after = ()
        # Of launches one by one the device waits for the host.
        flight.delayed = flight.seconds < _HOSTED * flight.host or self._capturer.worked_since(flight.jobs)
        return True

    def _examine(self, error: BaseException) -> None:
        """Notes an error of CUDA that stays: after an illegal access every call of the process fails."""
        if self.fault is None and compat.is_device_error(error):
            try:
                torch.cuda.synchronize(self.device)
            except Exception as again:
                self.fault = again
                logger.error("%s can serve nothing more in this process: %s", self.device, again)

    def flying(self) -> bool:
        """Whether a lane has bundles under way."""
        return any(lane.flights for lane in self._lanes)

    def at_work(self) -> Sequence[Flight]:
        """The first flight of each lane and those that are one with it, where the device has come to them."""
        found: list[Flight] = []
        now = self._clock()
        for lane in self._lanes:
            heads = lane.heads if lane.flights else ()
            if heads and passed(heads[0].start.event):
                began = self._times.reached(heads[0].start, now)
                for head in heads:
                    head.began = began
                found += heads
        return found

    def at_it(self, name: QueueName) -> bool:
        """Whether a lane has bundles from a queue under way."""
        return any(flight.bundle.issue.queue == name for lane in self._lanes for flight in list(lane.flights))

    def await_end(self, interrupt: Interrupt | None = None) -> None:
        """Looks at all lanes again after a moment: bundles may come on others. Without the GIL if it can."""
        native = compat.native.enqueue()
        flag = 0 if interrupt is None else interrupt.address
        while not interrupt and (heads := [head for lane in self._lanes if (head := lane.head) is not None]):
            if native is not None:
                if native.await_any([head.end.address for head in heads], _LOOK, flag):
                    return
            elif any(passed(head.end.event) for head in heads):
                return
            else:
                time.sleep(_GLANCE)

    def join(self, requests: Sequence[Request]) -> None:
        """The caller's current stream waits for the requests' bundles."""
        requests = [request for request in requests if request.flight is not None or request.alone]
        if not requests:
            return
        stream = compat.current_stream(self.device)
        address = stream.cuda_stream
        waited: set[int] = set()
        for request in requests:
            flight = cast("CudaFlight | None", request.flight)
            if flight is not None and not flight.finished and id(flight) not in waited:
                waited.add(id(flight))
                stream.wait_event(flight.end.event)
            if request.alone and request.joined != address:
                # These were allocated on the lane's stream, which could use their memory again too early.
                request.joined = address
                for output in request.outputs:
                    if isinstance(output, Tensor) and output.is_cuda:
                        output.record_stream(stream)

    def forget(self, served: ServedProgram) -> None:
        """Drops a program's graphs."""
        for lane in self._lanes:
            lane.forget(served.key)
        self._capturer.forget(served)
        self._joint.forget(served)

    def pool_bytes(self) -> int:
        """The pools of the lanes' graphs."""
        return sum([lane.pool_bytes for lane in self._lanes])

    def report(self, served: ServedProgram) -> ExecutorReport:
        """Captured sizes by lane, and what could not be captured."""
        named = self._lanes.named()
        graphs = [dict(lane.executables.get(served.key, {})) for lane in named]
        segments = max((graph.segments for each in graphs for graph in each.values()), default=1)
        captured = tuple(tuple(sorted(each)) for each in graphs)
        return ExecutorReport(captured, self._capturer.failures(served), segments)

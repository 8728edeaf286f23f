"""Bundles of several programs on CUDA: one table, one copy, one replay of the graph of their mix."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch

from torch_mux import compat
from torch_mux.runtime.bundle import Bundle, cap_of
from torch_mux.runtime.executors.base import plain_context, written_rows
from torch_mux.runtime.executors.joint_capture import JointCapturer, JointExecutable, Member
from torch_mux.runtime.lanes import CudaFlight, Lane, Mark, marks_of
from torch_mux.runtime.mixes import Mix, MixBook, MixReport, MixState, rounded
from torch_mux.runtime.ring import RingEntry
from torch_mux.runtime.served import ServedProgram
from torch_mux.runtime.verdicts import MixRun
from torch_mux.settings import Settings

__all__ = ["JointLauncher"]


class JointLauncher:
    """Enqueues mixes whose graphs are there, and asks for those that are not.

    Members are in the order of their programs' keys, whatever order they go out in, and have the next larger
    of the sizes of :func:`rounded`: so few graphs serve all mixes.
    """

    def __init__(self, capturer: JointCapturer, book: MixBook, sms: int) -> None:
        self._capturer = capturer
        self._book = book
        self._sms = sms

    def configure(self, settings: Settings) -> None:
        """Takes over new settings before the next bundle."""
        self._capturer.configure(settings)
        self._book.after = settings.pack_after

    def reports(self) -> tuple[MixReport, ...]:
        """The mixes that went out."""
        return self._book.reports()

    def forget(self, served: ServedProgram) -> None:
        """Drops the mixes with a program, and their graphs."""
        self._book.forget(served.key)

    def launch(
        self, lane: Lane, bundles: Sequence[Bundle], now: float, after: Sequence[CudaFlight] = ()
    ) -> tuple[list[CudaFlight], bool] | None:
        """Enqueues the bundles as one; None where they are to go out one by one.

        That is so until the graph of the mix is there, and where a row has to be written first.

        Args:
            after: flights of other lanes that it waits for on the device.

        Returns:
            The flights, and whether no row that they read is known to be old: else somebody has to look.
        """
        bundles = sorted(bundles, key=lambda bundle: bundle.served.key)
        members = [
            (
                bundle.served,
                min(rounded(len(bundle.requests)), max(bundle.served.slots, len(bundle.requests))),
            )
            for bundle in bundles
        ]
        mix = self._book.see(
            tuple((served.key, slots) for served, slots in members),
            [served.program.name for served, _ in members],
            now,
        )
        executable = self._executable(lane, mix, members)
        rows = [own for bundle in bundles if (own := written_rows(bundle)) is not None]
        whole = executable is not None and len(rows) == len(bundles)
        joint = whole and (self._book.after <= 0.0 or mix.verdict.next())
        run = MixRun(joint, len(bundles), partial(self._measured, mix))
        for bundle in bundles:
            bundle.run = run
        if executable is None or not joint:
            return None
        flights = _flights(lane, bundles, now, after)
        entry = self._filled(lane, executable, flights, rows)
        marks = marks_of([request for bundle in bundles for request in bundle.requests])
        marks += [flight.end for flight in after]
        unchanged = _enqueue(lane, entry, executable, flights, rows, marks)
        for flight in flights:
            held = [request.instance.held for request in flight.bundle.requests]
            flight.kept = (*held, executable, entry, marks)
        mix.joint += 1
        return flights, unchanged

    def _measured(self, mix: Mix, joint: bool, seconds: float) -> None:
        if mix.measured(joint, seconds):
            self._capturer.decided(mix)

    def _executable(self, lane: Lane, mix: Mix, members: Sequence[Member]) -> JointExecutable | None:
        """The graph to use; where there is none for the tables as they are, it is asked for."""
        found = cast("JointExecutable | None", mix.executables.get(lane))
        generations = tuple(served.storage.generation for served, _ in members)
        if found is not None and found.generations == generations:
            return found
        if mix.worthwhile:
            words = sum(2 + (slots + 1) * (1 + _columns(served)) for served, slots in members)
            if words > Lane.words():
                mix.state, mix.reason = MixState.FAILED, f"its table of {words} words is larger than a lane's"
            else:
                self._capturer.want(lane, mix, members)
        return None

    def _filled(
        self,
        lane: Lane,
        executable: JointExecutable,
        flights: Sequence[CudaFlight],
        rows: Sequence[list[int]],
    ) -> RingEntry:
        entry = lane.ring.take(flights[0].end)
        places = zip(flights, rows, executable.layouts, executable.starts, strict=True)
        for flight, own, layout, start in places:
            bundle = flight.bundle
            cap = cap_of(bundle.share, self._sms)
            entry.fill(layout, own, cap, *bundle.served.layouts.columns(bundle.requests), start=start)
        return entry


def _columns(served: ServedProgram) -> int:
    program = served.program
    return sum(spec is not None for spec in (*program.inputs, *program.outputs))


def _flights(
    lane: Lane, bundles: Sequence[Bundle], now: float, after: Sequence[CudaFlight]
) -> list[CudaFlight]:
    """Flights with one beginning and one end."""
    start, end = lane.marks.take(lane.stream), lane.marks.take(lane.stream)
    return [
        CudaFlight(bundle, now, start=start, end=end, follows=index > 0, after=tuple(after), way=None)
        for index, bundle in enumerate(bundles)
    ]


def _enqueue(
    lane: Lane,
    entry: RingEntry,
    executable: JointExecutable,
    flights: Sequence[CudaFlight],
    rows: Sequence[list[int]],
    marks: Sequence[Mark],
) -> bool:
    """Whether all rows were looked at meanwhile, and none is old."""
    native, flight = compat.native.enqueue(), flights[0]
    if native is not None and compat.is_current(lane.stream.device):
        known = [one.bundle.served.storage.watched(set(own)) for one, own in zip(flights, rows, strict=True)]
        changed = native.enqueue(
            lane.address,
            [mark.address for mark in marks],
            flight.start.address,
            lane.ring.address,
            entry.address,
            8 * executable.words,
            executable.graph.address,
            flight.end.address,
            [one for each in known for one in each or ()],
        )
        return None not in known and not changed
    with compat.on_stream(lane.stream), plain_context("cuda"), torch.inference_mode():
        for mark in marks:
            lane.stream.wait_event(mark.event)
        flight.start.event.record(lane.stream)
        lane.ring.send(entry, executable.words)
        executable.graph.replay(lane.stream)
        flight.end.event.record(lane.stream)
    return False

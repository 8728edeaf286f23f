"""A bundle's tables on a lane: one for the graph of its size, or one for each of the graphs that serve it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch_mux.runtime.bundle import cap_of
from torch_mux.runtime.lanes import CudaFlight, Executable, Lane, Mark
from torch_mux.runtime.ring import RingEntry, TableLayout

__all__ = ["Part", "enqueue_natively", "filled"]


@dataclass(frozen=True)
class Part:
    """Slots of a bundle that are replayed as one, or all of them where there is no graph.

    Attributes:
        executable: their graph; None: launches, one by one.
        layout: of their table.
        start: words of the entry before that.
    """

    executable: Executable | None
    layout: TableLayout
    start: int


def filled(
    lane: Lane, flight: CudaFlight, rows: Sequence[int], executables: Sequence[Executable], sms: int
) -> tuple[RingEntry, list[Part]]:
    """The tables of a bundle in one entry, ready to be copied; notes on the flight how it will run.

    Args:
        executables: that serve its slots one after another; none: it is launched.
        sms: multiprocessors of the device.
    """
    layouts, requests = flight.bundle.served.layouts, flight.bundle.requests
    cap = cap_of(flight.bundle.limit, sms)
    cap = cap if lane.context is None else min(cap, lane.context.sms)
    flight.way = (lane.kind, cap, tuple([one.slots for one in executables]))
    entry = lane.ring.take(flight.end)
    parts: list[Part] = []
    first = start = 0
    for executable in executables or (None,):
        layout = layouts.of(len(requests) if executable is None else executable.slots)
        end = first + layout.slots
        columns = layouts.columns(requests if len(executables) < 2 else requests[first:end])
        entry.fill(layout, list(rows[first:end]), cap, *columns, start=start)
        parts.append(Part(executable, layout, start))
        first, start = end, start + layout.words
    return entry, parts


def enqueue_natively(
    native: Any,
    lane: Lane,
    flight: CudaFlight,
    marks: Sequence[Mark],
    entry: RingEntry,
    parts: Sequence[Part],
    watched: list[Any],
) -> bool:
    """Enqueues replays, each in one native call; whether ``watched`` weights have changed, if they are known.

    Between two parts the end is recorded too early, and again by the next one, before anybody knows of it.
    """
    waits, start = [mark.address for mark in marks], flight.start.address
    changed = False
    for part in parts:
        assert part.executable is not None
        changed = native.enqueue(
            lane.address,
            waits,
            start,
            lane.ring.address,
            entry.address + 8 * part.start,
            part.layout.nbytes,
            part.executable.graph.address,
            flight.end.address,
            watched if part is parts[-1] else [],
        )
        waits, start = [], flight.end.address
    return changed

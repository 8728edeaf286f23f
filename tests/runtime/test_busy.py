"""Device time of bundles that overlap: its sum is the time in which the device was busy."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_mux.runtime.busy import BusyTime
from torch_mux.runtime.executors.base import Flight
from torch_mux.runtime.shares import PICOSECONDS


def flight(
    lane: int, began: float, ended: float, share: float = 1.0, part: float = 1.0, passes: bool = False
) -> Flight:
    issue = SimpleNamespace(passes=passes)
    bundle: Any = SimpleNamespace(lane=lane, share=share, part=part, issue=issue)
    return Flight(bundle, began, began=began, ended=ended, seconds=ended - began)


def seconds(flights: list[Flight]) -> list[float]:
    return [one.charge / PICOSECONDS for one in flights]


def test_bundles_of_one_lane_are_charged_what_they_took() -> None:
    busy, flights = BusyTime(), [flight(0, 0.0, 1.0), flight(0, 1.0, 1.5), flight(0, 3.0, 3.25)]
    busy.divide(flights[:1], flights[1:2])
    busy.divide(flights[1:], [])
    assert seconds(flights) == [1.0, 0.5, 0.25]


def test_what_overlaps_is_divided_by_caps() -> None:
    """The small bundle runs from 1 to 2 with a quarter of the device, beside one with three quarters."""
    busy, small, large = BusyTime(), flight(1, 1.0, 2.0, 0.25), flight(0, 0.0, 4.0, 0.75)
    busy.divide([small], [large])
    assert seconds([small, large]) == [0.25, 1.75]
    busy.divide([large], [])
    assert seconds([small, large]) == [0.25, 3.75]


def test_bundles_that_are_one_are_charged_by_their_parts() -> None:
    busy, pair = BusyTime(), [flight(0, 0.0, 2.0, part=0.25), flight(0, 0.0, 2.0, part=0.75)]
    busy.divide(pair, [])
    assert seconds(pair) == [0.5, 1.5]
    pair = [flight(0, 2.0, 4.0, part=0.25), flight(0, 2.0, 4.0, part=0.75)]
    beside = flight(1, 2.0, 4.0)
    busy.divide([*pair, beside], [])
    assert seconds([*pair, beside]) == [0.25, 0.75, 1.0], "as one they weigh as much as the other lane's"


def test_while_one_goes_first_the_time_is_its_own() -> None:
    busy, short, long = BusyTime(), flight(1, 1.0, 2.0, passes=True), flight(0, 0.0, 4.0)
    busy.divide([short], [long])
    busy.divide([long], [])
    assert seconds([short, long]) == [1.0, 3.0]
    assert (short.paused, long.paused) == (0.0, 1.0)


@given(
    lanes=st.lists(
        st.lists(st.tuples(st.floats(0.0, 0.5), st.floats(0.01, 1.0), st.floats(0.01, 1.0)), max_size=8),
        min_size=1,
        max_size=3,
    ),
    looks=st.lists(st.floats(0.0, 8.0), max_size=10),
    passing=st.integers(0, 3),
)
def test_the_sum_is_the_busy_time(
    lanes: list[list[tuple[float, float, float]]], looks: list[float], passing: int
) -> None:
    """Whenever somebody looks: nothing is lost, nothing is counted twice, nobody pays for idle time."""
    flights: list[Flight] = []
    for lane, bundles in enumerate(lanes):
        now = 0.0
        for gap, took, share in bundles:
            flights.append(flight(lane, now + gap, now + gap + took, share, passes=lane == passing))
            now += gap + took
    busy, left = BusyTime(), list(flights)
    for look in (*sorted(looks), 1e9):
        landed = [one for one in left if one.ended <= look]
        left = [one for one in left if one.ended > look]
        heads = {one.bundle.lane: one for one in reversed(left) if one.began <= look}
        busy.divide(landed, list(heads.values()))
    edges = sorted({one.began for one in flights} | {one.ended for one in flights})
    union = sum(
        end - begin
        for begin, end in pairwise(edges)
        if any(one.began <= begin and one.ended >= end for one in flights)
    )
    assert sum(seconds(flights)) == pytest.approx(union, abs=1e-6)
    assert all(0 <= one.charge <= (one.seconds + 1e-9) * PICOSECONDS for one in flights)
    assert all(one.charge <= (one.seconds - one.paused + 1e-6) * PICOSECONDS for one in flights)
    assert all(one.charge > 0 or one.paused for one in flights)

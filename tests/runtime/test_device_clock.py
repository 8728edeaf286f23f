"""Where bundles lie in time is the device's word; the host's clock bounds it from both sides."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_mux.runtime.executors.device_clock import DeviceClock


class Event:
    """Reached at a time of the device's own clock."""

    def __init__(self, at: float) -> None:
        self.at = at

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


def mark(at: float) -> Any:
    return SimpleNamespace(event=Event(at))


@given(
    offset=st.floats(-1e6, 1e6),
    bundles=st.lists(
        st.tuples(st.floats(0.0, 0.01), st.floats(0.0, 2e-4), st.floats(1e-5, 0.5), st.floats(0.0, 1e-3)),
        min_size=1,
        max_size=40,
    ),
)
def test_bundles_lie_to_each_other_as_on_the_device(offset: float, bundles: list[Any]) -> None:
    clock, now, exact = DeviceClock(), 1.0, []
    for gap, enqueued, length, seen in bundles:
        launched = now + gap
        begin = launched + enqueued
        end = begin + length
        now = end + seen
        start, finish = mark(begin + offset), mark(end + offset)
        ended, seconds = clock.ended(start, finish, launched, now)
        assert seconds == pytest.approx(length, abs=1e-6)
        assert launched + seconds - 1e-6 <= ended <= now
        assert clock.reached(start, now) == pytest.approx(ended - seconds, abs=1e-6)
        exact.append((ended - end, seen))
    # No earlier than it was enqueued and no later than it was seen.
    assert all(-2e-4 - 1e-6 <= error <= seen + 1e-6 for error, seen in exact)


def test_a_bundle_that_is_seen_late_ended_when_it_did() -> None:
    clock = DeviceClock()
    clock.ended(mark(10.0), mark(10.5), 0.0, 0.5)
    ended, seconds = clock.ended(mark(11.0), mark(11.25), 0.9, 9.0)
    assert (ended, seconds) == (pytest.approx(1.25), pytest.approx(0.25))


def test_hours_keep_their_precision() -> None:
    """Each interval is told in float32; they are short."""
    clock, asked = DeviceClock(), []

    class Coarse(Event):
        def elapsed_time(self, end: Event) -> float:
            asked.append(end.at - self.at)
            return super().elapsed_time(end)

    for second in range(7200):
        at = float(second)
        start, end = SimpleNamespace(event=Coarse(at)), SimpleNamespace(event=Coarse(at + 1e-3))
        ended, _ = clock.ended(start, end, at, at + 1.1e-3)  # type: ignore[arg-type]
        assert ended == pytest.approx(at + 1.1e-3, abs=2e-4)
    assert max(asked) < 3.0

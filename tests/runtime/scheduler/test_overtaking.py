"""Long bundles stop for more urgent ones at the end of a segment: who overtakes, and what it costs whom."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import Queue, Ticket
from simulated_lanes import LanedDevice, poisson

from torch_mux.runtime.scheduler.base import Busy, Issue, LaneKind, LaneLoad, View, lane_kinds
from torch_mux.runtime.scheduler.isolation import IsolatingPolicy
from torch_mux.runtime.scheduler.predictor import context
from torch_mux.settings import Settings
from torch_mux.types import Quota

SEGMENT = 2e-3
LONG, SHORT = 20e-3, 1e-3
HIGH = Quota("high", priority=1)


def work(key: str, slots: int) -> float:
    return SHORT if key.startswith("short") else LONG


def device(segment: float | None = SEGMENT, **changes: Any) -> LanedDevice:
    """Two tenants keep the common lane full of long bundles, one at a time."""
    made = LanedDevice(Settings(segment=segment, max_bundle=1, linger=0.0, **changes), work)
    for name in ("a", "b"):
        made.saturate(f"long-{name}", Quota(name), 2)
    made.run(0.5)  # long enough to know what a bundle takes
    return made


def began(made: LanedDevice, tenant: str) -> list[float]:
    """Seconds from each request of a tenant to the moment at which the device came to it."""
    return [
        begin - request.arrival
        for issue, begin, _ in made.ended
        for request in issue.requests
        if request.quota.tenant == tenant
    ]


def urgent_at(made: LanedDevice, quota: Quota, moments: list[float], key: str = "short") -> None:
    for moment in moments:
        made.at(moment, lambda: made.submit(key, quota, 99))


@pytest.mark.parametrize("isolation", ["off", "priority", "caps"])
def test_a_higher_class_waits_for_one_segment_at_most(isolation: str) -> None:
    made = device(isolation=isolation)
    moments = [0.5 + 0.037 * number for number in range(1, 60)]
    urgent_at(made, HIGH, moments)
    made.run(4.0)
    waits = began(made, "high")
    assert len(waits) == len(moments)
    assert max(waits) <= SEGMENT + 1e-9
    assert max(waits) > 0.5 * SEGMENT, "they came in the middle of segments"
    passed = [issue for _, issue in made.issues if issue.passes]
    assert {made.kinds[issue.lane] for issue in passed} == {LaneKind.PASSING}
    assert {request.quota.tenant for issue in passed for request in issue.requests} == {"high"}


def test_without_segments_it_waits_for_the_bundles_under_way() -> None:
    made = device(segment=None)
    urgent_at(made, HIGH, [0.5 + 0.037 * number for number in range(1, 60)])
    made.run(4.0)
    assert max(began(made, "high")) > LONG
    assert not any(issue.passes for _, issue in made.issues)


def test_an_earlier_deadline_goes_first_where_it_would_be_late_otherwise() -> None:
    made = device()
    hurried = Quota("hurried", slo=0.008)
    patient = Quota("patient", slo=10.0)
    for number in range(1, 30):
        for quota in (hurried, patient):
            moment = 0.5 + 0.1 * number
            made.at(moment, lambda quota=quota, moment=moment: submit_due(made, quota, moment))
    made.run(4.0)
    assert max(made.latencies["hurried"][2:]) <= 0.008
    passed = {request.quota.tenant for _, issue in made.issues if issue.passes for request in issue.requests}
    assert passed == {"hurried"}


def submit_due(made: LanedDevice, quota: Quota, moment: float) -> None:
    key = f"short-{quota.tenant}"
    ticket = Ticket(moment, 99, quota, 1 << 20, key, moment + (quota.slo or 0.0))
    made.queues.setdefault((key, False), Queue(key)).add(ticket)


def test_equals_do_not_overtake() -> None:
    made = device()
    urgent_at(made, Quota("equal", weight=8.0), [0.5 + 0.05 * number for number in range(1, 40)])
    made.run(3.0)
    assert not any(issue.passes for _, issue in made.issues)


def test_those_who_stop_lose_what_the_others_took_and_no_more() -> None:
    with_urgent, without = device(), device()
    urgent_at(with_urgent, HIGH, poisson(3, 100.0, 3.0, start=0.5))
    for made in (with_urgent, without):
        made.run(3.0)

    def of(made: LanedDevice) -> float:
        return made.served["a"] + made.served["b"]

    assert of(with_urgent) + with_urgent.served["high"] == pytest.approx(of(without), rel=0.01)
    assert with_urgent.served["a"] == pytest.approx(with_urgent.served["b"], rel=0.05)
    # What they stopped for is none of their own time.
    forecast = with_urgent.policy.predictor.forecast("long-a", 1, context(1.0, 0))
    assert forecast.median == pytest.approx(LONG, rel=0.01)


def test_a_short_bundle_is_waited_for() -> None:
    """Nobody takes the lane beside while his own will be free within a segment."""
    made = LanedDevice(Settings(segment=SEGMENT, max_bundle=1, linger=0.0), work)
    made.saturate("short-a", Quota("a"), 1)
    made.run(0.5)
    urgent_at(made, HIGH, [0.5 + 0.0137 * number for number in range(1, 40)], key="short-high")
    made.run(2.0)
    assert not any(issue.passes for _, issue in made.issues)


def test_who_is_asked_again_when_a_lane_is_full_is_woken_by_anybody() -> None:
    policy, made = IsolatingPolicy(), Settings(segment=SEGMENT, max_bundle=1)
    lanes = [LaneLoad(2 if kind is LaneKind.COMMON else 0, kind) for kind in lane_kinds(made)]
    for number in range(2):
        issue = Issue("long", (Ticket(0.0, 1, Quota("a"), number),), 1.0, start=0.0)
        policy.issued(issue, 0.0)
    queue = Queue("long", [Ticket(0.0, 1, Quota("a"), 3)])
    decision = policy.form(View([queue], lanes), 0.0, made)
    assert isinstance(decision, Busy) and decision.wake == {}


def test_a_bundle_that_ends_while_another_overtakes_does_not_hide_that_the_rest_is_stopped() -> None:
    made = LanedDevice(Settings(segment=SEGMENT, max_bundle=1, linger=0.0, in_flight=2), work)
    known(made)
    for moment, level in ((0.0, 0), (0.004, 0), (0.031, 0), (0.039, 1), (0.055, 2)):
        quota = Quota(f"t{level}", priority=level)
        made.at(moment, lambda quota=quota: made.submit("long-a", quota, hash(quota.tenant)))
    made.run(0.2)
    (wait,) = began(made, "t2")
    assert wait == pytest.approx(0.06 - 0.055), (
        "it follows the one that overtakes, and not those that stopped"
    )


def known(made: LanedDevice) -> None:
    """What bundles take was measured before."""
    for key in ("long-a", "long-b", "short-a", "short-b"):
        for slots in (1, 2, 3, 4):
            for _ in range(8):
                made.policy.predictor.observe(key, slots, context(1.0, 0), work(key, slots))


@settings(max_examples=100, deadline=None)
@given(
    arrivals=st.lists(
        st.tuples(
            st.floats(0.0, 0.03),
            st.sampled_from(["long-a", "long-b", "short-a", "short-b"]),
            st.integers(0, 2),
            st.sampled_from(["a", "b", "c"]),
        ),
        max_size=60,
    ),
    segment=st.floats(1e-3, 8e-3),
    isolation=st.sampled_from(["off", "priority", "caps"]),
)
def test_the_highest_class_waits_for_its_own_and_no_bundle_of_others(
    arrivals: list[tuple[float, str, int, str]], segment: float, isolation: str
) -> None:
    """Whatever else comes: for its own, for those that overtook before, and two segments at most besides."""
    made = LanedDevice(
        Settings(segment=segment, max_bundle=4, linger=0.0, isolation=isolation, in_flight=2), work
    )
    known(made)
    now, count = 0.0, 0
    for gap, key, level, tenant in arrivals:
        now += gap
        quota = Quota(f"{tenant}{level}", priority=level)
        made.at(now, lambda key=key, quota=quota: made.submit(key, quota, hash(quota.tenant)))
        count += 1
    made.run(now + 100 * LONG)
    assert sum(map(len, made.latencies.values())) == count
    highest = [
        (issue.passes or max(one.quota.priority for one in issue.requests) == 2) for issue, _, _ in made.ended
    ]
    before = _merged([(start, end) for (_, start, end), own in zip(made.ended, highest, strict=True) if own])
    for issue, begin, _ in made.ended:
        for request in issue.requests:
            if request.quota.priority == 2:
                # From its arrival on, the time in which the device worked for neither its class nor these.
                own = sum(max(0.0, min(end, begin) - max(start, request.arrival)) for start, end in before)
                assert begin - request.arrival - own <= 2 * segment + 1e-6


def _merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((begin, end))
    return merged

"""Tenants with a reserve on their own lane: latency, the others' share, what is lent and taken back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import Queue, Ticket
from simulated_lanes import LanedDevice, poisson

from torch_mux.runtime.scheduler.base import Issue, LaneKind, LaneLoad, View
from torch_mux.runtime.scheduler.isolation import IsolatingPolicy
from torch_mux.settings import Settings
from torch_mux.types import Quota

SECONDS = 2.0
LATENT = Quota("latent", reserve=0.25)
MODES = ("priority", "caps", "green")


def work(key: str, slots: int) -> float:
    """A small model for the tenant with a reserve, larger ones for its neighbours."""
    return 2e-4 * slots if key == "small" else 1e-3 + 2e-4 * slots


def device(isolation: str, neighbours: int = 8, reserved: bool = True, until: float = SECONDS) -> LanedDevice:
    made = LanedDevice(Settings(isolation=isolation, max_bundle=8), work)
    for number in range(neighbours):
        made.saturate(f"large{number % 2}", Quota(f"n{number}"), 2)
    if reserved:
        for moment in poisson(7, 200.0, until):
            made.at(moment, lambda: made.submit("small", LATENT, 1))
    return made


def p99(made: LanedDevice) -> float:
    ordered = sorted(made.latencies["latent"])
    assert len(ordered) > 100
    return ordered[int(0.99 * len(ordered))]


def of_neighbours(made: LanedDevice) -> float:
    return sum(seconds for name, seconds in made.served.items() if name != "latent")


def test_the_latency_beside_neighbours_is_that_of_the_same_quota_alone() -> None:
    """Alone with lending off is the hard variant: the tenant never has more than its reserve."""
    alone, beside = device("green", neighbours=0), device("caps")
    shared = device("off")
    for made in (alone, beside, shared):
        made.run(SECONDS)
    assert p99(beside) <= 1.05 * p99(alone)
    assert p99(shared) > 2 * p99(beside)


@pytest.mark.parametrize("isolation", MODES)
def test_the_others_keep_what_is_not_reserved(isolation: str) -> None:
    beside, without = device(isolation), device(isolation, reserved=False)
    beside.run(SECONDS)
    without.run(SECONDS)
    assert of_neighbours(beside) >= 0.9 * 0.75 * of_neighbours(without)


def test_a_flood_gets_its_reserve_and_no_more() -> None:
    made = device("caps", reserved=False)
    made.saturate("small", LATENT, 32)
    made.run(SECONDS)
    assert made.served["latent"] == pytest.approx(0.25 * SECONDS, rel=0.05)
    assert of_neighbours(made) == pytest.approx(0.75 * SECONDS, rel=0.05)


def test_floods_share_what_they_have_by_reserve() -> None:
    made = device("caps", reserved=False)
    for name, reserve in (("a", 0.1), ("b", 0.3)):
        made.saturate(f"small-{name}", Quota(name, reserve=reserve, weight=5.0), 32)
    made.run(SECONDS)
    assert made.served["b"] / made.served["a"] == pytest.approx(3.0, rel=0.1)
    assert made.served["a"] == pytest.approx(0.1 * SECONDS, rel=0.1)


@pytest.mark.parametrize("isolation", MODES)
def test_a_request_with_a_reserve_waits_for_no_bundle_of_others(isolation: str) -> None:
    made = device(isolation)
    made.run(SECONDS)
    waits = sorted(made.waits["latent"])
    # Now and then two bundles of its own are under way already.
    assert waits[int(0.95 * len(waits))] == pytest.approx(0.0, abs=1e-9)
    assert {made.kinds[issue.lane] for _, issue in made.issues if issue.reserved} == {LaneKind.RESERVED}


def test_an_idle_reserve_is_lent_and_taken_back_at_once() -> None:
    made = device("caps", until=1.0)
    made.at(2.0, lambda: made.submit("small", LATENT, 1))
    made.run(3.0)
    others = [(moment, issue) for moment, issue in made.issues if not issue.reserved]

    def shares(begin: float, end: float) -> set[float]:
        return {round(issue.share, 6) for moment, issue in others if begin < moment < end}

    assert shares(0.1, 1.0 - 0.05) == {0.75}
    assert shares(1.1, 2.0 - 1e-6) == {1.0}
    assert shares(2.0, 2.005) == {0.75}
    (again,) = [moment for moment, issue in made.issues if issue.reserved and moment > 1.5]
    assert again == pytest.approx(2.0, abs=1e-8)
    idle = [moment for moment, issue in others if moment > 2.001 and issue.share == 1.0]
    assert idle[0] < 2.1


def test_seldom_requests_cost_the_others_nothing_in_between() -> None:
    """With a second between them the next one hardly comes during a bundle of three milliseconds."""
    made = LanedDevice(Settings(max_bundle=8), work)
    for number in range(8):
        made.saturate(f"large{number % 2}", Quota(f"n{number}"), 2)
    for number in range(1, 8):
        made.at(float(number), lambda: made.submit("small", LATENT, 1))
    made.run(8.0)
    capped = [moment for moment, issue in made.issues if not issue.reserved and issue.share < 1.0]
    # At first nothing is known of the gaps; from then on it is capped while the request is under way.
    assert all(moment % 1.0 < 0.01 for moment in capped if moment > 3.0)


def test_alone_a_tenant_with_a_reserve_has_the_whole_device() -> None:
    made = device("caps", neighbours=0)
    made.run(SECONDS)
    assert {issue.share for _, issue in made.issues} == {1.0}


def test_green_lanes_confine_both() -> None:
    made = device("green")
    made.run(SECONDS)
    for moment, issue in made.issues:
        kind = made.kinds[issue.lane]
        if issue.reserved:
            assert (kind, issue.share) == (LaneKind.RESERVED, 0.25)
            assert issue.reserve == 0.25
        elif moment > 0.1:
            assert (kind, issue.share) == (LaneKind.CONFINED, 0.75)


def test_without_isolation_a_reserve_does_nothing() -> None:
    made = device("off")
    made.run(SECONDS)
    assert {issue.lane for _, issue in made.issues} == {0}
    assert {issue.share for _, issue in made.issues} == {1.0}


tenants = st.lists(
    st.tuples(st.sampled_from([0.0, 0.0, 0.1, 0.2, 0.3]), st.floats(0.2, 1.0), st.sampled_from("xyz")),
    min_size=1,
    max_size=3,
)


@settings(max_examples=100, deadline=None)
@given(
    tenants=tenants,
    arrivals=st.lists(st.tuples(st.integers(0, 2), st.floats(0.0, 0.01)), max_size=50),
    isolation=st.sampled_from(["caps", "green"]),
    most=st.integers(1, 8),
    lanes=st.integers(1, 2),
    linger=st.sampled_from([0.0, 0.002]),
)
def test_caps_leave_room_for_every_reserve_in_use(
    tenants: list[tuple[float, float, str]],
    arrivals: list[tuple[int, float]],
    isolation: str,
    most: int,
    lanes: int,
    linger: float,
) -> None:
    """What goes out beside a tenant with a reserve leaves its part free, and everybody is served."""
    chosen = Settings(isolation=isolation, max_bundle=most, lanes=lanes, linger=linger)
    made = LanedDevice(chosen, lambda key, slots: 1e-3 + 1e-3 * slots)
    quotas = [
        Quota(f"t{number}", sms=max(sms, reserve), reserve=reserve)
        for number, (reserve, sms, _) in enumerate(tenants)
    ]
    now = 0.0
    for number, gap in arrivals:
        now += gap
        quota, key = quotas[number % len(tenants)], tenants[number % len(tenants)][2]

        def arrive(quota: Quota = quota, key: str = key) -> None:
            made.submit(key, quota, hash(quota.tenant))

        made.at(now, arrive)
    check = room_is_left(made)
    made.run(now + 5.0)
    check()
    assert sum(map(len, made.latencies.values())) == len(arrivals)


def room_is_left(made: LanedDevice) -> Callable[[], None]:
    """What a bundle of others may have, noted when it goes out."""
    found: list[tuple[float, float]] = []
    original = made.policy.issued

    def issued(issue: Any, now: float) -> None:
        if not issue.reserved:
            flying = [one.issue for lane in made.lanes for one in lane if one.issue.reserved]
            tickets = [ticket for each in flying for ticket in each.requests]
            own = [queue for queue in made.queues.values() if queue.reserved]
            tickets += [ticket for queue in own for ticket in queue.requests]
            held = {ticket.quota.tenant: ticket.quota.reserve for ticket in tickets}
            found.append((issue.share, 1.0 - sum(held.values())))
        original(issue, now)

    made.policy.issued = issued  # type: ignore[method-assign]

    def check() -> None:
        for share, room in found:
            assert share <= room + 1e-9

    return check


def test_a_tenant_that_gave_up_its_reserve_is_forgotten_after_a_minute() -> None:
    """Its neighbours' decisions are as simple as before, and nothing is set aside for it."""
    policy = IsolatingPolicy()
    made = Settings()

    def send(quota: Quota, now: float) -> Issue:
        queue = Queue("small", [Ticket(now, 0, quota)], reserved=quota.reserve > 0.0)
        decision = policy.form(View([queue], [LaneLoad(), LaneLoad(0, LaneKind.RESERVED)]), now, made)
        assert isinstance(decision, Issue)
        policy.issued(decision, now)
        policy.completed(decision, now + 0.01, 0.01)
        return decision

    assert send(LATENT, 0.0).reserve == 0.25
    assert send(Quota("latent"), 1.0).reserve == 0.25
    send(Quota("other"), 70.0)
    assert send(Quota("other"), 71.0).reserve == 0.0


def test_what_is_kept_for_reserves_in_use_is_told_apart_from_all_of_them() -> None:
    policy, made = IsolatingPolicy(), Settings()
    lanes = [LaneLoad(), LaneLoad(0, LaneKind.RESERVED)]

    def others(now: float) -> Issue:
        decision = policy.form(View([Queue("large", [Ticket(now, 1, Quota("n"))])], lanes), now, made)
        assert isinstance(decision, Issue)
        return decision

    mine = Queue("small", [Ticket(0.0, 2, LATENT)], reserved=True)
    own = policy.form(View([mine], lanes), 0.0, made)
    assert isinstance(own, Issue) and own.reserved
    policy.issued(own, 0.0)
    assert (others(0.001).kept, others(0.001).share) == (0.25, 0.75)
    policy.completed(own, 0.002, 0.001)
    later = others(1.0)
    assert (later.kept, later.share, later.reserve) == (0.0, 1.0, 0.25)

"""Programs on branches: who overlaps with whom, and what of fairness, classes and forecasts holds there."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import Device, Queue, Ticket

from torch_mux.runtime.scheduler.base import Busy, Issue, LaneKind, LaneLoad, View, idle_lanes
from torch_mux.runtime.scheduler.branches import CROWDED, Homes, part_of
from torch_mux.runtime.scheduler.policy import FairPolicy
from torch_mux.settings import Settings
from torch_mux.types import Quota


def loads(*bundles: int) -> list[LaneLoad]:
    return [LaneLoad(count, LaneKind.COMMON, branch) for branch, count in enumerate(bundles)]


def device(branches: int, took: float = 1e-3, **chosen: int) -> Device:
    made = Settings(linger=0.0, **chosen)  # type: ignore[arg-type]
    return Device(FairPolicy(), made, lambda key, slots: took, branches, branches=True)


def test_lanes_have_branches_and_a_tenant_with_a_reserve_has_one_lane() -> None:
    lanes = idle_lanes(Settings(lanes=2, isolation="green"), 3)
    kinds = [lane.kind for lane in lanes]
    assert kinds.count(LaneKind.COMMON) == 6
    assert kinds[2:4] == [LaneKind.RESERVED, LaneKind.CONFINED], "in the place they have without branches"
    common = Counter(lane.branch for lane in lanes if lane.kind is LaneKind.COMMON)
    assert common == {0: 2, 1: 2, 2: 2}
    assert {lane.branch for lane in lanes if lane.kind is not LaneKind.COMMON} == {None}
    assert {lane.branch for lane in idle_lanes(Settings(lanes=2))} == {None}


def test_programs_that_are_pending_together_go_out_beside_each_other() -> None:
    made = device(4, max_bundle=4)
    for key in "abcd" * 3:
        made.submit(key, Quota(key))
    made.dispatch()
    assert {issue.key: issue.lane for issue in made.issues} == {"a": 0, "b": 1, "c": 2, "d": 3}
    assert [len(issue.requests) for issue in made.issues] == [3, 3, 3, 3]


def test_one_program_keeps_to_one_branch_and_its_bundles_stay_large() -> None:
    made = device(4, max_bundle=8)
    for number in range(40):
        made.submit("a", Quota(f"t{number % 8}"))
    list(made.advance(1.0))
    assert {issue.lane for issue in made.issues} == {0}
    assert [len(issue.requests) for issue in made.issues] == [8] * 5


def test_a_full_branch_holds_up_nobody_else() -> None:
    policy, queue = FairPolicy(), Queue("b", [Ticket(0.0, 1, Quota("bob"))])
    full = Queue("a", [Ticket(0.0, 2, Quota("alice"))])
    policy.issued(Issue("a", full.requests, 1.0, branch=0), 0.0)
    decision = policy.form(View([full, queue], loads(2, 0)), 0.0, Settings(linger=0.0))
    assert isinstance(decision, Issue) and (decision.key, decision.lane) == ("b", 1)
    assert isinstance(policy.form(View([full], loads(2, 0)), 0.0, Settings(linger=0.0)), Busy)


def test_a_lower_class_does_not_go_beside_who_waits_for_his_branch() -> None:
    policy = FairPolicy()
    first = Queue("a", [Ticket(0.0, 2, Quota("alice", priority=1))])
    policy.issued(Issue("a", first.requests, 1.0, branch=0), 0.0)
    low = Queue("b", [Ticket(0.0, 1, Quota("bob", priority=0))])
    chosen = Settings(linger=0.0)
    assert isinstance(policy.form(View([first, low], loads(2, 0)), 0.0, chosen), Busy)
    decision = policy.form(View([low], loads(2, 0)), 0.0, chosen)
    assert isinstance(decision, Issue) and decision.key == "b", "nobody of a higher class waits any more"


def test_thirty_programs_share_the_branches_evenly() -> None:
    made = device(4, max_bundle=4)
    for number in range(30):
        made.submit(f"p{number}", Quota(f"t{number}"))
    list(made.advance(1.0))
    assert len(made.issues) == 30
    assert sorted(Counter(issue.lane for issue in made.issues).values()) == [7, 7, 8, 8]


def test_who_always_waits_behind_another_program_moves_to_an_idle_branch() -> None:
    homes, now = Homes(), 0.0
    for key, branch in (("a", 0), ("b", 1), ("c", 0)):
        one = Issue(key, (), 1.0, lane=branch, branch=branch)
        homes.issued(one, now, 1e-3)
        homes.completed(one)
    for _ in range(CROWDED):
        now += 1e-3
        pair = [Issue(key, (), 1.0, branch=0) for key in "ac"]
        assert homes.of("c", 2, now) == 0
        for issue in pair:
            homes.issued(issue, now, 1e-3)
        for issue in pair:
            homes.completed(issue)
    assert (homes.of("a", 2, now), homes.of("c", 2, now)) == (0, 1)
    homes.forget("c")
    assert homes.of("c", 1, now) == 0, "fewer branches than before"


def test_a_bundle_waits_for_those_of_its_own_branch_only() -> None:
    policy = FairPolicy()
    for _ in range(4):
        for key in "ab":
            issue = Issue(key, [Ticket(0.0, 1)], 1.0, lane="ab".index(key), branch="ab".index(key))
            policy.issued(issue, 0.0)
            policy.completed(issue, 0.0, 0.01)
    policy.issued(Issue("a", [Ticket(0.0, 1)], 1.0, branch=0), 0.0)
    assert policy.outlook("a", 1, 1, 0.0) == pytest.approx(0.02)
    assert policy.outlook("b", 1, 1, 0.0) == pytest.approx(0.01)


def test_parts_grow_with_the_time_that_is_needed() -> None:
    assert part_of(1.0, [1.0], None) == 1.0
    assert part_of(1.0, [], 1.0) == 1.0
    assert part_of(3.0, [1.0], 1.0) == 0.75
    assert part_of(3.0, [1.0], 2.0) == 1.0
    assert part_of(1.0, [99.0], 1.0) == pytest.approx(1 / 9)
    assert part_of(99.0, [1.0], 1.0) == pytest.approx(8 / 9), "room is left for the short one"
    assert part_of(0.0, [0.0], 1.0) == 1.0
    made = Device(
        FairPolicy(), Settings(linger=0.0, beside=1.0), lambda key, slots: 3e-3 if key == "a" else 1e-3, 2,
        branches=True,
    )  # fmt: skip
    for _ in range(8):
        for key in "ab":
            made.submit(key, Quota(key))
        list(made.advance(made.now + 0.1))
    for key in "ab":
        made.submit(key, Quota(key))
    made.dispatch()
    parts = {issue.key: issue.beside for issue in made.issues[-2:]}
    assert parts == {"a": pytest.approx(0.75), "b": pytest.approx(0.25)}


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.5, 1.0, 4.0]), min_size=2, max_size=6),
    places=st.lists(st.integers(0, 4), min_size=6, max_size=6),
    costs=st.lists(st.sampled_from([2e-4, 1e-3, 5e-3]), min_size=5, max_size=5),
    branches=st.integers(2, 4),
    most=st.integers(1, 4),
)
def test_shares_of_device_seconds_follow_the_weights_on_branches(
    weights: list[float], places: list[int], costs: list[float], branches: int, most: int
) -> None:
    """Tenants who always have something pending are charged by weight, up to a few bundles of theirs."""
    policy, served = FairPolicy(), Counter[str]()
    tenants = {f"t{i}": (f"p{places[i]}", weight) for i, weight in enumerate(weights)}
    cost = {f"p{i}": each for i, each in enumerate(costs)}
    made = Device(
        policy, Settings(linger=0.0, max_bundle=most), lambda key, slots: cost[key] * slots, branches,
        branches=True,
    )  # fmt: skip

    def refill(name: str, requests: int) -> None:
        for _ in range(requests):
            made.submit(tenants[name][0], Quota(name, weight=tenants[name][1]))

    for name in tenants:
        refill(name, 4 * most)

    def run(until: float) -> None:
        for issue in made.advance(until):
            for ticket in issue.requests:
                served[ticket.quota.tenant] += cost[issue.key]  # type: ignore[assignment]
                refill(ticket.quota.tenant, 1)

    run(0.2)
    start = Counter(served)
    run(1.2)
    longest = max(most * each for each in cost.values())
    for one, other in combinations(tenants, 2):
        lag = [(served[name] - start[name]) / tenants[name][1] for name in (one, other)]
        slack = sum(6 * longest / tenants[name][1] for name in (one, other))
        assert abs(lag[0] - lag[1]) <= slack


@settings(max_examples=60, deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 3), st.floats(0.0, 2e-3)), max_size=60),
    branches=st.integers(2, 4),
    most=st.integers(1, 4),
)
def test_everything_goes_out_once_and_programs_keep_their_order(
    arrivals: list[tuple[int, int, float]], branches: int, most: int
) -> None:
    made = device(branches, max_bundle=most)
    tickets = []
    for key, tenant, gap in arrivals:
        list(made.advance(made.now + gap))
        tickets.append(made.submit(f"p{key}", Quota(f"t{tenant}")))
    list(made.advance(made.now + 10.0))
    out = [ticket for issue in made.issues for ticket in issue.requests]
    assert sorted(ticket.seq for ticket in out) == [ticket.seq for ticket in tickets]
    lanes: dict[str, set[int]] = {}
    for issue in made.issues:
        lanes.setdefault(issue.key, set()).add(issue.lane)
    assert all(len(found) == 1 for found in lanes.values())

"""Deadlines: who goes first, how large a bundle is, how long it is held; and what is refused at once."""

from __future__ import annotations

from typing import Any

import pytest
from clocks import Told
from simulated import IDLE, Queue, Ticket

from torch_mux.errors import DeadlineUnattainable
from torch_mux.runtime.scheduler.base import Issue, LaneLoad, Later, View
from torch_mux.runtime.scheduler.policy import FairPolicy
from torch_mux.settings import Settings
from torch_mux.types import Quota


def trained(**costs: tuple[float, float]) -> FairPolicy:
    """A policy that has seen bundles of 1 to 16 slots of each program take ``fixed + each * slots``."""
    policy = FairPolicy()
    for key, (fixed, each) in costs.items():
        for slots in (1, 2, 4, 8, 16):
            for _ in range(4):
                policy.predictor.observe(key, slots, (16, 0), fixed + each * slots)
        policy._measured[key] = 0.0
    return policy


def tickets(tenant: str, count: int, due: float = float("inf"), seq: int = 0) -> list[Ticket]:
    return [Ticket(0.0, 1, Quota(tenant), seq + number, due=due) for number in range(count)]


def form(policy: FairPolicy, *queues: Queue, now: float = 0.0, **settings: Any) -> Any:
    return policy.form(View(queues, IDLE), now, Settings(**settings))


def test_who_would_be_late_behind_another_bundle_goes_first() -> None:
    policy = trained(a=(0.0, 1e-3), b=(1e-3, 0.0))
    old, hurried = Queue("a", tickets("old", 8)), Queue("b", tickets("urgent", 1, 5e-3, 8))
    assert form(policy, old, hurried).key == "b"
    for due in (20e-3, 0.5e-3):  # he can wait; he would be late anyway
        assert form(policy, old, Queue("b", tickets("urgent", 1, due, 8))).key == "a"


def test_the_earliest_deadline_goes_first() -> None:
    policy = trained(a=(1e-3, 0.0), b=(1e-3, 0.0), c=(4e-3, 0.0))
    queues = [
        Queue("c", tickets("x", 1)),
        Queue("a", tickets("y", 1, 4e-3, 1)),
        Queue("b", tickets("z", 1, 3e-3, 2)),
    ]
    assert form(policy, *queues).key == "b"


def test_a_higher_class_goes_before_a_deadline() -> None:
    policy = trained(a=(4e-3, 0.0), b=(1e-3, 0.0))
    first = Queue("a", [Ticket(0.0, 1, Quota("vip", priority=1))])
    assert form(policy, first, Queue("b", tickets("urgent", 1, 3e-3, 1))).key == "a"


def test_a_deadline_takes_nobody_further_ahead_than_the_longest_bundle() -> None:
    policy = trained(a=(0.0, 1e-3), b=(0.0, 1e-3))
    taken, now = [], 0.0
    patient, hasty = Queue("a", tickets("patient", 400)), Queue("b")
    for turn in range(60):
        hasty.requests.take(list(hasty.requests))  # who was not served gives up and asks again
        hasty.add(*tickets("hasty", 4, now + 4.1e-3, 1000 + 10 * turn))
        decision = form(policy, patient, hasty, now=now, max_bundle=4)
        for queue in (patient, hasty):
            if queue.key == decision.key:
                queue.requests.take(decision.requests)
        policy.issued(decision, now)
        now += 4e-3
        policy.completed(decision, now, 1e-3 * len(decision.requests))
        taken.append(decision.key)
    assert 24 <= taken.count("b") <= 36


def test_a_bundle_that_would_make_an_urgent_tenant_late_is_made_smaller() -> None:
    policy = trained(a=(1e-3, 1e-3))
    queue = Queue("a", [*tickets("many", 7), *tickets("urgent", 1, 4.5e-3, 7)])
    decision = form(policy, queue)
    assert isinstance(decision, Issue)
    assert [request.quota.tenant for request in decision.requests] == ["urgent", "many", "many"]
    assert decision.start is not None  # the others stay behind
    roomy = Queue("a", [*tickets("many", 7), *tickets("urgent", 1, 9.5e-3, 7)])
    assert len(form(policy, roomy).requests) == 8


def test_a_bundle_is_not_made_smaller_while_more_is_pending_than_it_takes() -> None:
    """Who is left behind pays for it and is late himself: in an overload bundles would get ever smaller."""
    policy = trained(a=(1e-3, 1e-3))
    queue = Queue("a", [*tickets("many", 70), *tickets("urgent", 1, 4.5e-3, 70)])
    decision = form(policy, queue)
    assert len(decision.requests) == 64
    assert decision.requests[0].quota.tenant == "urgent"


def test_what_is_enqueued_already_counts() -> None:
    policy = trained(a=(1e-3, 1e-3))
    first = form(policy, Queue("a", tickets("x", 4)))
    policy.issued(first, 0.0)
    queue = Queue("a", [*tickets("many", 7), *tickets("urgent", 1, 5e-3 + 3.5e-3, 7)])
    decision = policy.form(View([queue], [LaneLoad(1)]), 0.0, Settings(linger=0.0))
    assert isinstance(decision, Issue)
    assert [request.quota.tenant for request in decision.requests] == ["urgent", "many"]


def test_a_hold_ends_before_it_makes_somebody_late() -> None:
    policy = trained(a=(1e-3, 0.0))
    queue = Queue("a", tickets("x", 1, due=11e-3))
    decision = form(policy, queue, max_wait=1.0)
    assert isinstance(decision, Later)
    assert 9e-3 <= decision.until < 10e-3
    assert isinstance(form(policy, queue, now=decision.until, max_wait=1.0), Issue)
    assert form(policy, Queue("a", tickets("x", 1)), max_wait=1.0).until == 1.0


def served(lab: Any, seconds: float, **settings: Any) -> tuple[Any, Any, Any]:
    clock = Told()
    engine, program, model = lab.engine(clock, **settings), lab.program(), lab.Affine(2.0)
    engine.register(program)
    assert engine.quiesce(10)

    def take(inputs: Any) -> None:
        clock.now += seconds * inputs[0].shape[0]

    lab.plans["affine"].before = take
    for _ in range(5):
        lab.submit(engine, program, model).result()
    return engine, program, model


def test_what_cannot_meet_its_deadline_is_refused_at_once_or_served_late(lab: Any) -> None:
    engine, program, model = served(lab, 0.02)
    before = len(lab.plans["affine"].bundles)
    with pytest.raises(DeadlineUnattainable, match=r"'a' cannot meet its deadline of 0\.01 s.*take 0\.02"):
        lab.submit(engine, program, model, quota=Quota("a", deadline=0.01))
    assert len(lab.plans["affine"].bundles) == before
    lab.submit(engine, program, model, quota=Quota("a", slo=0.01)).result()
    lab.submit(engine, program, model, quota=Quota("a", deadline=5.0)).result()
    got = engine.stats().tenants["a"]
    assert (got.accepted, got.late, got.ok, got.refused) == (2, 1, 1, 1)


def admitted(lab: Any, crowd: int, **quota: Any) -> int:
    """Requests with a deadline of 30 bundles that are let in behind so many of another tenant."""
    engine, program, model = served(lab, 0.01, max_bundle=1)
    others = [lab.submit(engine, program, model, quota=Quota("crowd")) for _ in range(crowd)]
    own: list[Any] = []

    def fill_up() -> None:
        for _ in range(100):
            own.append(lab.submit(engine, program, model, quota=Quota("a", deadline=0.3, **quota)))

    with pytest.raises(DeadlineUnattainable):
        fill_up()
    engine.wait([*others, *own])
    got = engine.stats().tenants["a"]
    assert (got.late, got.expired) == (0, 0)
    return len(own)


def test_of_others_as_many_count_as_go_before(lab: Any) -> None:
    assert 25 <= admitted(lab, 0) <= 30
    assert 13 <= admitted(lab, 200) <= 16  # they take turns
    assert 18 <= admitted(lab, 200, weight=2.0) <= 21
    assert 25 <= admitted(lab, 200, priority=1) <= 30
    assert 22 <= admitted(lab, 5) <= 25


def test_one_who_is_alone_is_not_refused_for_what_was_long_ago() -> None:
    policy = trained(a=(1.0, 0.0))
    assert policy.outlook("a", 1, 1, 0.5) == pytest.approx(1.5)
    assert policy.outlook("a", 1, 2, 0.5) == pytest.approx(2.5)
    assert policy.outlook("a", 1, 1, 2.0) is None
    assert policy.outlook("unknown", 1, 1, 0.5) is None


def test_a_first_run_of_a_minute_refuses_nobody(lab: Any) -> None:
    policy = FairPolicy()
    for seconds in (60.0, 1e-3, 1e-3, 1e-3):
        issue = Issue("a", tickets("x", 1), 1.0)
        policy.issued(issue, 0.0)
        assert policy.outlook("a", 1, 1, 0.0) is None
        policy.completed(issue, 0.0, seconds)
    assert policy.outlook("a", 1, 1, 0.0) == pytest.approx(1e-3)


@pytest.mark.parametrize("slots", [1, 2])
def test_the_earliest_deadline_is_in_the_bundle(slots: int) -> None:
    policy = trained(a=(1e-3, 1e-3), b=(5e-3, 0.0))
    hurried = Queue("a", slots=slots)
    for number, (tenant, due) in enumerate((("relaxed", 7e-3), ("mid", 6e-3), ("soon", 5e-3))):
        hurried.add(*tickets(tenant, 1, due, number))
    issue = form(policy, hurried, Queue("b", tickets("other", 1, seq=9)))
    assert [one.quota.tenant for one in issue.requests][0] == "soon"
    assert [one.quota.tenant for one in issue.requests] == ["soon", "mid"][:slots]


def test_no_lower_class_rides_along_while_a_higher_one_waits() -> None:
    policy = trained(a=(0.0, 1e-3), b=(0.0, 1e-3))
    mixed = Queue("a", [Ticket(0.0, 1, Quota("high", priority=1)), *tickets("low", 15, seq=1)])
    other = Queue("b", [Ticket(0.0, 1, Quota("also-high", priority=1), 20)])
    assert [one.quota.tenant for one in form(policy, mixed, other).requests] == ["high"]
    assert len(form(policy, mixed).requests) == 16
    waiting_low = Queue("b", tickets("low-too", 1, seq=20))
    assert len(form(policy, mixed, waiting_low).requests) > 1


def test_calls_that_depend_on_each_other_keep_their_order() -> None:
    policy = FairPolicy()
    queue = Queue("a", slots=1, ordered=True)
    for number in range(6):
        queue.add(Ticket(0.0, 1, Quota("xy"[number // 4], weight=1.0), number))
    order = []
    while len(queue.requests):
        issue = form(policy, queue)
        order += [one.seq for one in issue.requests]
        queue.requests.take(issue.requests)
        policy.issued(issue, 0.0)
        policy.completed(issue, 0.0, 1e-3)
    assert order == [0, 1, 2, 3, 4, 5]

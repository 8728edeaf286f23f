"""All that is pending of several programs at once: when that takes nothing from anybody, and what goes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated import IDLE, Queue, Ticket

from torch_mux.runtime.scheduler.base import Issue, LaneKind, LaneLoad, View
from torch_mux.runtime.scheduler.isolation import IsolatingPolicy
from torch_mux.runtime.scheduler.policy import FairPolicy
from torch_mux.settings import Settings
from torch_mux.types import Quota

LINGER = 0.01


def chosen(**changes: Any) -> Settings:
    return Settings(**{"linger": LINGER, "max_bundle": 8, **changes})


def pending(*sizes: int, at: float = 0.0, **quota: Any) -> list[Queue]:
    """Programs "a", "b", …, with so many requests each, one of each tenant."""
    return [
        Queue(key, [Ticket(at, 1, Quota(f"{key}{number}", **quota)) for number in range(count)])
        for key, count in zip("abcdefgh", sizes)
    ]


@given(sizes=st.lists(st.integers(1, 12), min_size=2, max_size=6), most=st.integers(1, 12))
def test_it_is_what_would_have_gone_one_after_the_other(sizes: list[int], most: int) -> None:
    queues, settings = pending(*sizes), chosen(max_bundle=most)
    policy, asked = FairPolicy(), FairPolicy()
    found = policy.everything(View(queues, IDLE), 0.0, settings)
    if max(sizes) > most:
        assert not found, "somebody is left behind, so the order matters"
        return
    left, one_by_one = list(queues), {}
    while left:
        decision = asked.form(View(left, IDLE), 0.0, settings)
        assert isinstance(decision, Issue)
        asked.issued(decision, 0.0)
        one_by_one[decision.key] = (set(decision.requests), decision.lane, decision.share)
        left = [queue for queue in left if queue.key != decision.key]
    assert {one.key: (set(one.requests), one.lane, one.share) for one in found} == one_by_one
    assert all(one.start is None for one in found), "nobody is charged for it: it took nothing from anybody"


def test_bundles_of_the_same_programs_under_way_are_in_nobodys_way() -> None:
    policy, settings = FairPolicy(), chosen()
    for issue in policy.everything(View(pending(2, 3), IDLE), 0.0, settings):
        policy.issued(issue, 0.0)
    again = policy.everything(View(pending(1, 2), [LaneLoad(1)]), 1e-4, settings)
    assert [len(issue.requests) for issue in again] == [1, 2]


@pytest.mark.parametrize("ended", [False, True])
def test_who_is_expected_back_to_another_program_is_waited_for(ended: bool) -> None:
    policy, settings = FairPolicy(), chosen()
    (other,) = pending(2)
    other.key = "z"
    issue = policy.form(View([other], IDLE), 0.0, settings)
    assert isinstance(issue, Issue)
    policy.issued(issue, 0.0)
    if ended:
        policy.completed(issue, 1e-3, 1e-3)
    assert not policy.everything(View(pending(1, 1), IDLE), 1e-3, settings)
    if not ended:
        policy.completed(issue, 1e-3, 1e-3)
    assert policy.everything(View(pending(1, 1), IDLE), 1e-3 + 2 * LINGER, settings)


def contended(policy: FairPolicy, settings: Settings) -> None:
    """Somebody was left behind, so that tenants are charged; his program is "a"."""
    issue = policy.form(View(pending(9, 1), IDLE), 0.0, settings)
    assert isinstance(issue, Issue) and issue.start is not None
    policy.issued(issue, 0.0)


def test_while_somebody_is_at_work_those_who_go_are_charged() -> None:
    policy, settings = FairPolicy(), chosen()
    contended(policy, settings)
    before = {name: policy._time(0).account(name).tag for name in ("a0", "b0")}
    found = policy.everything(View(pending(1, 1), [LaneLoad(1)]), 1e-4, settings)
    assert [issue.start for issue in found] == [min(before.values())] * 2
    for issue in found:
        policy.issued(issue, 1e-4)
    assert all(policy._time(0).account(name).tag > tag for name, tag in before.items())


def test_who_is_ahead_by_more_than_a_bundle_waits_for_others() -> None:
    policy, settings = FairPolicy(), chosen()
    contended(policy, settings)
    policy._time(0).account("a0").charge(1.0)
    lanes = [LaneLoad(1)]
    assert not policy.everything(View(pending(1, 1), lanes), 1e-4, settings)
    assert policy.everything(View(pending(0, 1, 1)[1:], lanes), 1e-4, settings) == (), "a0 is expected back"


def test_of_several_classes_the_higher_goes_first() -> None:
    policy, settings = FairPolicy(), chosen()
    contended(policy, settings)
    queues = [*pending(1), Queue("b", [Ticket(0.0, 1, Quota("high", priority=1))])]
    assert not policy.everything(View(queues, [LaneLoad(1)]), 1e-4, settings)


def test_two_programs_that_come_together_stay_together_and_neither_starves() -> None:
    """The device time of one is three times the other's; both clients ask again at once."""
    took = {"a": 1e-3, "b": 3e-3}
    policy, settings = FairPolicy(), chosen(linger=0.0)
    served = dict.fromkeys(took, 0)
    now = 0.0
    for _ in range(200):
        queues = [Queue(key, [Ticket(now, 1, Quota(key))]) for key in took]
        issues = list(policy.everything(View(queues, IDLE), now, settings))
        if not issues:
            decision = policy.form(View(queues, IDLE), now, settings)
            assert isinstance(decision, Issue)
            issues = [decision]
        for issue in issues:
            policy.issued(issue, now)
        for issue in issues:
            now += took[issue.key]
            policy.completed(issue, now, took[issue.key])
            served[issue.key] += 1
    assert min(served.values()) >= 60


def test_a_deadline_a_part_of_the_device_a_hold_or_no_plan_ask_for_an_order() -> None:
    plain = pending(1, 1)
    assert FairPolicy().everything(View(plain, IDLE), 0.0, chosen())
    unready = [plain[0], Queue("b", [Ticket(0.0, 1)], ready=False)]
    cases = [
        ([plain[0], Queue("b", [Ticket(0.0, 1, due=1.0)])], chosen()),
        (plain, chosen(beside=1.0)),
        (plain, chosen(max_wait=1.0)),
        (unready, chosen()),
    ]
    for queues, settings in cases:
        assert not FairPolicy().everything(View(queues, IDLE), 0.0, settings)
    assert not FairPolicy().everything(View(plain, [LaneLoad(settings.in_flight)]), 0.0, settings)


def test_programs_without_a_home_are_given_one_first() -> None:
    policy, settings = FairPolicy(), chosen()
    lanes = [LaneLoad(0, LaneKind.COMMON, branch) for branch in range(4)]
    left = pending(1, 1)
    assert not policy.everything(View(left, lanes), 0.0, settings), "both would be given the same"
    while left:
        issue = policy.form(View(left, lanes), 0.0, settings)
        assert isinstance(issue, Issue)
        policy.issued(issue, 0.0)
        policy.completed(issue, 1e-3, 1e-3)
        left = [queue for queue in left if queue.key != issue.key]
    found = policy.everything(View(pending(1, 1, at=1.0), lanes), 1.0, settings)
    assert [issue.lane for issue in found] == [0, 1]


def test_while_a_reserve_is_in_use_there_is_an_order() -> None:
    settings = chosen(isolation="caps")
    lanes = [LaneLoad(0, LaneKind.COMMON), LaneLoad(0, LaneKind.RESERVED)]
    policy = IsolatingPolicy()
    assert policy.everything(View(pending(1, 1), lanes), 0.0, settings)
    mine = Queue("c", [Ticket(0.0, 1, Quota("mine", reserve=0.5))], reserved=True)
    assert not policy.everything(View([*pending(1, 1), mine], lanes), 0.0, settings)
    issue = policy.form(View([mine], lanes), 0.0, settings)
    assert isinstance(issue, Issue)
    policy.issued(issue, 0.0)
    assert not policy.everything(View(pending(1, 1), lanes), 0.0, settings)


def test_where_bundles_may_be_overtaken_there_is_an_order() -> None:
    lanes = [LaneLoad(0, LaneKind.COMMON), LaneLoad(0, LaneKind.PASSING)]
    view = View(pending(1, 1), lanes)
    assert IsolatingPolicy().everything(view, 0.0, chosen())
    assert not IsolatingPolicy().everything(view, 0.0, chosen(segment=1e-3))

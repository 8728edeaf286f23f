"""All that is pending of several programs at once: when that takes nothing from anybody, and what goes."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from simulated import IDLE, Queue, Ticket

from torch_mux.runtime.scheduler.base import Issue, LaneKind, LaneLoad, Later, View
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


def test_bundles_under_way_are_in_nobodys_way_where_all_are_even() -> None:
    policy, settings = FairPolicy(), chosen()
    for issue in policy.everything(View(pending(2, 3), IDLE), 0.0, settings):
        policy.issued(issue, 0.0)
    again = policy.everything(View(pending(1, 2), [LaneLoad(1)]), 1e-4, settings)
    assert [(len(issue.requests), issue.start) for issue in again] == [(1, 0.0), (2, 0.0)]


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
    assert policy.everything(View(pending(0, 1, 1)[1:], lanes), 1e-4, settings), "who is behind need not"


@pytest.mark.parametrize("busy", [False, True])
def test_of_several_classes_the_higher_goes_first(busy: bool) -> None:
    policy, settings = FairPolicy(), chosen()
    if busy:
        contended(policy, settings)
    high = Ticket(0.0, 1, Quota("high", priority=1))
    for queues in (
        [*pending(1), Queue("b", [high])],
        [Queue("a", [Ticket(0.0, 1), high]), *pending(0, 1)[1:]],
    ):
        assert not policy.everything(View(queues, [LaneLoad(int(busy))]), 1e-4, settings)


def test_without_a_linger_weights_count_all_the_same() -> None:
    """Who asks again at the moment of the end is never seen to be expected back."""
    weights, served, now = {"a": 1.0, "b": 4.0}, dict.fromkeys("ab", 0.0), 0.0
    policy, settings = FairPolicy(), chosen(linger=0.0)
    queues = {key: Queue(key, [Ticket(0.0, 1, Quota(key, weight=weight))]) for key, weight in weights.items()}
    for _ in range(2000):
        view = View([queue for queue in queues.values() if queue.requests], IDLE)
        issues = list(policy.everything(view, now, settings)) if len(view.queues) > 1 else []
        if not issues:
            decision = policy.form(view, now, settings)
            assert isinstance(decision, Issue)
            issues = [decision]
        for issue in issues:
            queues[issue.key].requests.take([one for one in issue.requests if isinstance(one, Ticket)])
            policy.issued(issue, now)
        for issue in issues:
            now += 1e-3
            served[issue.key] += 1e-3
            policy.completed(issue, now, 1e-3)
            queues[issue.key].add(Ticket(now, 1, Quota(issue.key, weight=weights[issue.key])))
    assert served["b"] / served["a"] == pytest.approx(4.0, rel=0.05)


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


class Loops:
    """Clients in a closed loop, each with so many requests pending or under way; bundles on one lane."""

    def __init__(self, loops: dict[str, tuple[str, float, int]], costs: dict[str, float]) -> None:
        self.loops, self.costs = loops, costs
        self.policy, self.settings = FairPolicy(), chosen(max_bundle=32)
        self.now, self.free, self.mixes = 0.0, 0.0, 0
        self.queues: dict[str, list[Ticket]] = {}
        self.flying: list[tuple[float, list[Issue]]] = []
        self.served: Counter[str] = Counter()
        self.wrong = 0.0
        for name, (_, _, depth) in loops.items():
            self.ask(name, depth)

    def ask(self, name: str, requests: int) -> None:
        key, weight, _ = self.loops[name]
        tickets = [Ticket(self.now, 1, Quota(name, weight=weight)) for _ in range(requests)]
        self.queues.setdefault(key, []).extend(tickets)

    def step(self) -> None:
        """One decision, or one end."""
        queues = [Queue(key, tickets) for key, tickets in self.queues.items() if tickets]
        issues: list[Issue] = []
        if queues:
            view = View(queues, [LaneLoad(len(self.flying))])
            issues = list(self.policy.everything(view, self.now, self.settings)) if len(queues) > 1 else []
            self.mixes += bool(issues)
            if not issues:
                decision = self.policy.form(view, self.now, self.settings)
                issues = [decision] if isinstance(decision, Issue) else []
                if isinstance(decision, Later) and (not self.flying or decision.until < self.flying[0][0]):
                    self.now = max(self.now, decision.until)
                    return
        if not issues:
            self.end()
            return
        for issue in issues:
            self.queues[issue.key] = [one for one in self.queues[issue.key] if one not in issue.requests]
            self.policy.issued(issue, self.now)
            seconds = self.costs[issue.key] * len(issue.requests)
            charge = self.policy._flying.get(issue)
            if charge is not None:
                self.wrong = max(self.wrong, abs(seconds - charge.each * len(issue.requests)))
            self.free = max(self.free, self.now) + seconds
            for request in issue.requests:
                self.served[request.quota.tenant] += seconds / len(issue.requests)
        self.flying.append((self.free, issues))

    def end(self) -> None:
        self.now, issues = self.flying.pop(0)
        for issue in issues:
            self.policy.completed(issue, self.now, self.costs[issue.key] * len(issue.requests))
            for request in issue.requests:
                self.ask(request.quota.tenant, 1)


@examples(max_examples=60, deadline=None)
@given(
    loops=st.lists(
        st.tuples(st.sampled_from("ab"), st.sampled_from([1.0, 2.0]), st.integers(1, 3)),
        min_size=2,
        max_size=5,
    ),
    costs=st.tuples(st.sampled_from([1e-4, 1e-3]), st.sampled_from([1e-4, 1e-3])),
)
def test_the_lag_bound_holds_where_bundles_go_as_one(
    loops: list[tuple[str, float, int]], costs: tuple[float, float]
) -> None:
    """Of those who are pending or expected back at every decision; see FairPolicy for the bound."""
    assume(len({key for key, _, _ in loops}) == 2)  # of one program all go whenever they fit
    named = {f"t{number}": loop for number, loop in enumerate(loops)}
    lab = Loops(named, dict(zip("ab", costs)))
    for _ in range(60):
        lab.step()
    lab.wrong, start = 0.0, Counter(lab.served)
    longest = max(
        lab.costs[key] * sum(depth for other, _, depth in loops if other == key) for key, _, _ in loops
    )
    least = min(weight for _, weight, _ in loops)
    for _ in range(200):
        lab.step()
        bound = {
            name: (2 * longest + depth * lab.costs[key]) / weight + 4 * lab.wrong / least
            for name, (key, weight, depth) in named.items()
        }
        for f, g in combinations(named, 2):
            lag = [(lab.served[name] - start[name]) / named[name][1] for name in (f, g)]
            assert abs(lag[0] - lag[1]) <= bound[f] + bound[g] + 1e-9


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
    again = pending(1, 1, at=1.0)
    assert [issue.lane for issue in policy.everything(View(again, lanes), 1.0, settings)] == [0, 1]
    assert not policy.everything(View(again, lanes[:1]), 1.0, settings), "the other's home is no more"


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

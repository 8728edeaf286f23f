"""Weighted fair order: shares, the lag bound, newcomers, classes, companions of other programs."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import IDLE, Device, Queue, Ticket

from torch_mux.runtime.scheduler.base import Issue, View
from torch_mux.runtime.scheduler.policy import FairPolicy
from torch_mux.settings import Settings
from torch_mux.types import Quota


class Backlog:
    """Tenants who always have requests pending, and what each was served."""

    def __init__(
        self, tenants: dict[str, tuple[str, float]], costs: dict[str, tuple[float, float]], **options: int
    ) -> None:
        self.tenants = tenants
        self.costs = costs
        self.policy = FairPolicy()
        self.device = Device(self.policy, Settings(linger=0.0, **options), self.seconds)  # type: ignore[arg-type]
        self.served: Counter[str] = Counter()
        self.wrong = 0.0
        for name in tenants:
            self.refill(name, 4 * self.device.settings.max_bundle)

    def seconds(self, key: str, slots: int) -> float:
        fixed, each = self.costs[key]
        return fixed + each * slots

    def refill(self, name: str, requests: int) -> None:
        key, weight = self.tenants[name]
        for _ in range(requests):
            self.device.submit(key, Quota(name, weight=weight))

    def step(self) -> Issue:
        """One more bundle."""
        while True:
            view = self.device.view()
            decision = self.policy.form(view, self.device.now, self.device.settings)
            if isinstance(decision, Issue):
                break
            next(self.device.advance(float("inf")))
        slots = len(decision.requests)
        seconds = self.seconds(decision.key, slots)
        self.device._issue(decision)
        charge = self.policy._flying.get(decision)
        if charge is not None:
            self.wrong = max(self.wrong, abs(seconds - charge.each * slots))
        for request in decision.requests:
            self.served[request.quota.tenant] += seconds / slots
            self.refill(request.quota.tenant, 1)
        return decision


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 8.0]), min_size=2, max_size=6),
    places=st.lists(st.integers(0, 2), min_size=6, max_size=6),
    costs=st.lists(
        st.tuples(st.sampled_from([0.0, 1e-3]), st.sampled_from([1e-4, 1e-3, 5e-3])), min_size=3, max_size=3
    ),
    most=st.integers(1, 8),
    flying=st.integers(1, 2),
)
def test_no_two_backlogged_tenants_lag_more_than_the_bound(
    weights: list[float],
    places: list[int],
    costs: list[tuple[float, float]],
    most: int,
    flying: int,
) -> None:
    """Over every interval that starts once the costs are known; see FairPolicy for the bound."""
    tenants = {f"t{i}": (f"p{places[i]}", weight) for i, weight in enumerate(weights)}
    lab = Backlog(tenants, {f"p{i}": cost for i, cost in enumerate(costs)}, max_bundle=most, in_flight=flying)
    while len(lab.policy.predictor._programs) < len({key for key, _ in tenants.values()}) or any(
        account.credit for account in lab.policy._times[0]._accounts.values()
    ):
        lab.step()
    for _ in range(40):
        lab.step()
    lab.wrong, start = 0.0, Counter(lab.served)
    longest = max(lab.seconds(key, most) for key, _ in tenants.values())
    one = {name: lab.seconds(key, 1) for name, (key, _) in tenants.items()}
    if len({key for key, _ in tenants.values()}) == 1:
        longest = 0.0  # nobody waits for another program
    slack = flying * lab.wrong / min(weights)
    for _ in range(120):
        lab.step()
        slack = flying * lab.wrong / min(weights)
        bound = {name: (longest + one[name]) / tenants[name][1] + slack for name in tenants}
        for f, g in combinations(tenants, 2):
            lag = [(lab.served[name] - start[name]) / tenants[name][1] for name in (f, g)]
            assert abs(lag[0] - lag[1]) <= bound[f] + bound[g] + 1e-9


def test_shares_follow_the_weights() -> None:
    tenants = {f"t{weight}": (f"p{weight % 3}", float(weight)) for weight in (1, 2, 4, 8)}
    lab = Backlog(tenants, {"p0": (0.0, 1e-3), "p1": (1e-3, 3e-3), "p2": (0.0, 5e-4)}, max_bundle=8)
    for _ in range(1500):
        lab.step()
    whole = sum(lab.served.values())
    for name, (_, weight) in tenants.items():
        assert lab.served[name] / whole == pytest.approx(weight / 15, rel=0.05)


def test_equal_weights_get_equal_device_time_of_unequal_programs() -> None:
    tenants = {f"t{number}": (f"p{number}", 1.0) for number in range(4)}
    costs = {f"p{number}": (2e-4 * number, 1e-4 * 3**number) for number in range(4)}
    lab = Backlog(tenants, costs, max_bundle=16)
    for _ in range(2000):
        lab.step()
    assert max(lab.served.values()) / min(lab.served.values()) < 1.02


def test_a_full_bundle_is_shared_by_turns_and_not_by_age() -> None:
    queue = Queue("a", [Ticket(0.0, 1, Quota("greedy"), seq) for seq in range(10)])
    queue.add(Ticket(0.1, 2, Quota("late"), 10), Ticket(0.1, 2, Quota("late"), 11))
    decision = FairPolicy().form(View([queue], IDLE), 0.1, Settings(max_bundle=4))
    assert isinstance(decision, Issue)
    assert [request.seq for request in decision.requests] == [0, 10, 1, 11]


def test_who_was_idle_has_saved_nothing_up() -> None:
    tenants = {"busy": ("a", 1.0), "other": ("b", 1.0), "idle": ("c", 1.0)}
    lab = Backlog(tenants, dict.fromkeys("abc", (0.0, 1e-3)), max_bundle=4)
    for _ in range(30):
        lab.step()
    lab.device.queues["c"].requests.take(list(lab.device.queues["c"].requests))
    for _ in range(100):
        lab.step()
    before = Counter(lab.served)
    lab.refill("idle", 40)
    for _ in range(6):
        lab.step()
    got = lab.served["idle"] - before["idle"]
    assert 0 < got <= 3 * 4e-3


def test_a_busy_periods_debts_end_with_it() -> None:
    lab = Backlog({"x": ("a", 1.0), "y": ("b", 1.0)}, {"a": (0.0, 1e-3), "b": (0.0, 1e-3)}, max_bundle=4)
    for _ in range(20):
        lab.step()
    assert len(lab.policy._times[0]) == 2
    for queue in lab.device.queues.values():
        queue.requests.take(list(queue.requests))
    lab.device.submit("a", Quota("x"))
    lab.device.dispatch()
    assert len(lab.policy._times[0]) == 2, "a bundle flies: its tenants may be back at once"
    for _ in lab.device.advance(1e3):
        pass
    lab.device.submit("a", Quota("x"))
    lab.device.dispatch()
    assert lab.policy._times == {}


def test_a_higher_class_goes_first_and_the_lower_one_gets_what_is_left() -> None:
    urgent, patient = Quota("urgent", priority=1), Quota("patient")
    queues = [
        Queue("a", [Ticket(0.0, 1, patient, 0)]),
        Queue("b", [Ticket(1.0, 2, patient, 1), Ticket(1.0, 2, urgent, 2), Ticket(1.0, 2, urgent, 3)]),
    ]
    policy = FairPolicy()
    decision = policy.form(View(queues, IDLE), 1.0, Settings(max_bundle=2))
    assert isinstance(decision, Issue)
    assert (decision.key, [request.seq for request in decision.requests]) == ("b", [2, 3])
    decision = policy.form(View(queues, IDLE), 1.0, Settings(max_bundle=3))
    assert isinstance(decision, Issue)
    assert [request.seq for request in decision.requests] == [1, 2, 3]


def test_companions_far_ahead_of_others_stay_behind() -> None:
    """A tenant with many requests does not ride past another program's tenant in a neighbour's bundles."""
    tenants = {"many": ("a", 1.0), "few": ("a", 1.0), "other": ("b", 1.0)}
    lab = Backlog(tenants, {"a": (0.0, 1e-3), "b": (0.0, 1e-3)}, max_bundle=16)
    few = [request for request in lab.device.queues["a"].requests if request.quota.tenant == "few"]
    lab.device.queues["a"].requests.take(few)
    lab.tenants = {**tenants, "few": ("a", 1.0)}
    for _ in range(300):
        if not any(request.quota.tenant == "few" for request in lab.device.queues["a"].requests):
            lab.refill("few", 1)
        lab.step()
    assert lab.served["many"] == pytest.approx(lab.served["other"], abs=2 * 16e-3)


def test_also_where_all_would_fit_who_is_far_ahead_stays_behind() -> None:
    policy = FairPolicy()
    mine = Queue("a", [Ticket(0.0, 1, Quota("modest"), 0), Ticket(0.0, 2, Quota("ahead"), 1)])
    other = Queue("b", [Ticket(0.0, 3, Quota("other"), 2)])
    policy._time(0).account("ahead").tag = 1.0
    decision = policy.form(View([mine, other], IDLE), 0.0, Settings())
    assert isinstance(decision, Issue)
    assert [request.quota.tenant for request in decision.requests] == ["modest"]
    alone = policy.form(View([mine], IDLE), 0.0, Settings())
    assert isinstance(alone, Issue)
    assert len(alone.requests) == 2


def test_a_bundle_that_did_not_run_is_not_charged() -> None:
    policy = FairPolicy()
    queue = Queue("a", [Ticket(0.0, 1, Quota(name), seq) for seq, name in enumerate(["x", "x", "y", "y"])])
    decision = policy.form(View([queue], IDLE), 0.0, Settings(max_bundle=1))
    assert isinstance(decision, Issue)
    policy.issued(decision, 0.0)
    charged = policy._times[0].account("x")
    assert charged.tag > 0.0
    policy.completed(decision, 0.0, 0.0)
    assert charged.tag - charged.credit == 0.0

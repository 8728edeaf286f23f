"""A day of a thousand tenants in a simulation: shares, lag, no starvation, no lost request, faults."""

from __future__ import annotations

import random
from collections import Counter
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_day import Day, bursts

from torch_mux.runtime.scheduler.base import Issue, LaneKind
from torch_mux.settings import Settings
from torch_mux.types import Quota

HOURS = 3600.0
DAY = 24 * HOURS
PROGRAMS = 12
#: Tenants who always have requests pending, with their programs and weights.
GREEDY = {"g1": ("p0", 1.0), "g2": ("p0", 2.0), "g4": ("p1", 4.0), "g8": ("greedy", 8.0)}
#: Tenants with a reserve, on a lane of their own: four of a hundred parts each.
RESERVED = {f"t{number}": 0.04 for number in (7, 27, 47)}
LONGEST = (4.0 + 64 * 0.25) / (1.0 - sum(RESERVED.values()))


def seconds(key: str, slots: int) -> float:
    """A day is scaled: bundles of seconds instead of milliseconds."""
    return 4.0 + 0.25 * slots


def quota_of(number: int) -> Quota:
    """Most tenants have no limits; some have one of each kind."""
    name = f"t{number}"
    if name in RESERVED:
        return Quota(name, reserve=RESERVED[name])
    kinds: dict[int, dict[str, Any]] = {
        0: {"slo": 60.0},
        1: {"deadline": 120.0},
        2: {"rate": 1 / 600, "burst": 3},
        3: {"rate": 1 / 600, "burst": 3, "excess": "refuse"},
        4: {"max_pending": 4},
        5: {"priority": 1},
        6: {"rate": 1 / 300, "burst": 1, "deadline": 600.0},
    }
    return Quota(name, **kinds.get(number % 20, {}))


class Greedy:
    """Keeps the greedy tenants backlogged and follows how far apart they are.

    Args:
        tenants: their programs and weights.
        longest: seconds of the longest bundle that is forecast.
    """

    def __init__(
        self, day: Day, tenants: dict[str, tuple[str, float]] = GREEDY, longest: float = LONGEST
    ) -> None:
        self.day, self.tenants, self.longest = day, tenants, longest
        self.served: Counter[str] = Counter()
        self.start: Counter[str] | None = None
        self.wrong: list[float] = [0.0]
        self.issues = self.lent = 0
        day.on_issue = self.issued
        for name in tenants:
            for _ in range(2 * day.settings.max_bundle):
                self.refill(name)

    def refill(self, name: str) -> None:
        key, weight = self.tenants[name]
        self.day.submit(key, Quota(name, weight=weight), client=hash(name))

    def issued(self, issue: Issue, seconds: float) -> None:
        if issue.reserved:
            return
        self.issues += 1
        self.lent += issue.share == 1.0
        slots = len(issue.requests)
        charge = self.day.policy.common._flying.get(issue)
        assert charge is not None, "the greedy are always left behind"
        self.wrong.append(abs(seconds - charge.each * slots))
        for request in issue.requests:
            if request.quota.tenant in self.tenants:
                self.served[request.quota.tenant] += seconds / slots  # type: ignore[assignment]
                self.refill(request.quota.tenant)
        if self.start is None:
            return
        # Two bundles are under way, and what was charged too much is taken off the next charge.
        slack = 3 * max(self.wrong)
        weights = {name: weight for name, (_, weight) in self.tenants.items()}
        lag = {name: (self.served[name] - self.start[name]) / weight for name, weight in weights.items()}
        least = min(weights.values())
        bound = {
            name: (self.longest + 4.25 / 0.88) / weight + slack / least for name, weight in weights.items()
        }
        for f, g in combinations(self.tenants, 2):
            assert abs(lag[f] - lag[g]) <= bound[f] + bound[g]

    def begin(self) -> None:
        """From now on the lag is looked at."""
        self.start, self.wrong = Counter(self.served), [0.0]


def check_counts(day: Day) -> None:
    tenants = day.accounting.snapshot().tenants
    for name, got in tenants.items():
        ends = got.ok + got.late + got.expired + got.cancelled + got.errors
        assert got.accepted == ends + got.pending, name
    assert sum(got.accepted for got in tenants.values()) == len(day.requests)
    times = [tenant.device_time for tenant in day.accounting._tenants.values()]
    assert sum(times) == day.accounting._device_time


@pytest.fixture(scope="module")
def day() -> Day:
    """The day itself: a thousand tenants, four of them greedy, with faults all day long."""
    draw = random.Random(20261124)
    greedy_programs = {key for key, _ in GREEDY.values()}
    day = Day(
        Settings(max_bundle=64, linger=5.0, in_flight=2),
        seconds,
        faulty=lambda key: key not in greedy_programs and draw.random() < 0.01,
        guilty=lambda: draw.random() < 0.001,
        slower=lambda: 3.0 if draw.random() < 0.005 else 1.0,
    )
    for number in range(996):
        quota, key = quota_of(number), f"p{number % PROGRAMS}"
        for moment in bursts(draw, DAY / 30, DAY):
            day.at(moment, lambda key=key, quota=quota, number=number: day.submit(key, quota, number))

    def cancel_some() -> None:
        recent = [request for request in day.requests[-500:] if request.quota.tenant not in GREEDY]
        pending = [request for request in recent if not request.out]
        for request in draw.sample(pending, min(3, len(pending))):
            day.cancel(request)

    def recompile() -> None:
        program = day.program(f"p{draw.randrange(2, PROGRAMS)}")
        program.ready = False
        day.at(day.now + 900.0, lambda: setattr(program, "ready", True))

    def jump(by: float) -> None:
        day.skew += by

    greedy = Greedy(day)
    day.at(0.2 * HOURS, greedy.begin)
    for hour in range(1, 24):
        day.at(hour * HOURS, cancel_some)
        day.at((hour + 0.4) * HOURS, recompile)
    day.at(7.1 * HOURS, lambda: jump(600.0))
    day.at(15.1 * HOURS, lambda: jump(-300.0))
    day.run(DAY)
    day.greedy = greedy  # type: ignore[attr-defined]
    return day


def test_every_accepted_request_is_counted_once(day: Day) -> None:
    check_counts(day)
    snapshot = day.accounting.snapshot()
    assert snapshot.device_seconds == pytest.approx(day.busy)
    # It never rests while the greedy wait.
    assert day.busy_of[LaneKind.COMMON] == pytest.approx(DAY, rel=0.02)
    everybody = snapshot.tenants.values()
    for outcome in ("ok", "late", "expired", "cancelled", "errors"):
        assert sum(getattr(got, outcome) for got in everybody) > 0, outcome
    assert sum(day.refused.values()) > 0


def test_the_greedy_share_what_is_left_by_weight(day: Day) -> None:
    greedy = day.greedy  # type: ignore[attr-defined]
    whole = sum(greedy.served.values())
    assert whole > 0.4 * DAY
    for name, (_, weight) in GREEDY.items():
        assert greedy.served[name] / whole == pytest.approx(weight / 15, rel=0.05)


def test_nobody_starves(day: Day) -> None:
    """A modest tenant waits for a few bundles, however long the queues of the greedy are."""
    waits = sorted(
        request.started - request.eligible
        for request in day.requests
        if request.quota.tenant not in GREEDY and request.state.value == "done"
    )
    assert len(waits) > 20_000
    assert waits[len(waits) // 2] < 4 * LONGEST
    assert waits[int(0.99 * len(waits))] < 2000.0  # the plan of its program was away for 900, or its clock
    assert waits[-1] < 2 * HOURS


def test_a_reserve_waits_for_nobody_else(day: Day) -> None:
    """Their bundles are seldom behind one of their own, and never behind those of the others."""
    mine = [one for one in day.requests if one.quota.tenant in RESERVED and one.state.value == "done"]
    assert len(mine) > 50
    waits = sorted(one.started - one.eligible for one in mine if one.eligible == one.arrival)
    assert waits[len(waits) // 2] < 1e-6
    assert waits[int(0.9 * len(waits))] < 3 * 4.25 / min(RESERVED.values())


def test_an_unused_reserve_is_lent_all_day(day: Day) -> None:
    """Three tenants who ask thirty times a day hold nobody back but for a while after each request."""
    greedy = day.greedy  # type: ignore[attr-defined]
    assert greedy.lent > 0.8 * greedy.issues > 0
    assert greedy.issues > greedy.lent


def test_what_is_pending_at_midnight_still_ends(day: Day) -> None:
    day.on_issue = lambda issue, seconds: None
    day.run()
    assert all(request.out for request in day.requests)
    check_counts(day)
    assert sum(got.pending for got in day.accounting.snapshot().tenants.values()) == 0
    assert (day.policy.common._flying, len(day.policy.common.order)) == ({}, 0)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 1 << 20),
    most=st.sampled_from([16, 32, 64]),
    isolation=st.sampled_from(["off", "priority", "caps"]),
    segment=st.sampled_from([None, 6.0]),
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 4.0, 8.0]), min_size=4, max_size=4),
    cv=st.sampled_from([1.0, 4.0, 8.0]),
    faults=st.floats(0.0, 0.05),
    slow=st.floats(0.0, 0.01),
    gone=st.lists(st.integers(0, PROGRAMS - 1), max_size=3),
    jumps=st.lists(st.tuples(st.floats(0.2, 1.0), st.floats(-300.0, 600.0)), max_size=2),
)
def test_any_hour_of_a_thousand_tenants(
    seed: int,
    most: int,
    isolation: str,
    segment: float | None,
    weights: list[float],
    cv: float,
    faults: float,
    slow: float,
    gone: list[int],
    jumps: list[tuple[float, float]],
) -> None:
    """The same for settings, weights, bursts and faults that nobody chose: lag, counts, nobody lost."""
    draw = random.Random(seed)
    greedy_programs = {key for key, _ in GREEDY.values()}
    tenants = {name: (key, weight) for (name, (key, _)), weight in zip(GREEDY.items(), weights, strict=True)}
    made = Settings(max_bundle=most, linger=5.0, in_flight=2, isolation=isolation, segment=segment)
    day = Day(
        made,
        seconds,
        faulty=lambda key: key not in greedy_programs and draw.random() < faults,
        guilty=lambda: draw.random() < faults / 10,
        slower=lambda: 3.0 if draw.random() < slow else 1.0,
    )
    for number in range(996):
        quota, key = quota_of(number), f"p{number % PROGRAMS}"
        for moment in bursts(draw, HOURS / 2, HOURS, cv):
            day.at(moment, lambda key=key, quota=quota, number=number: day.submit(key, quota, number))
    for turn, number in enumerate(gone):
        program = day.program(f"p{number}")
        if program.key not in greedy_programs:
            day.at(600.0 * (turn + 1), lambda program=program: setattr(program, "ready", False))
            day.at(600.0 * (turn + 1) + 500.0, lambda program=program: setattr(program, "ready", True))

    def jump(by: float) -> None:
        day.skew += by

    for part, by in jumps:
        day.at(part * HOURS, lambda by=by: jump(by))
    reserved = sum(RESERVED.values()) if isolation == "caps" else 0.0
    greedy = Greedy(day, tenants, (4.0 + most * 0.25) / (1.0 - reserved))
    day.at(0.2 * HOURS, greedy.begin)
    day.run(HOURS)
    assert greedy.issues > 20 and len(day.requests) > 2000
    day.on_issue = lambda issue, seconds: None
    day.run()
    assert all(request.out for request in day.requests)
    check_counts(day)


requests = st.tuples(
    st.integers(0, 6),
    st.sampled_from("abc"),
    st.floats(0.0, 0.02),
    st.sampled_from(
        [
            {},
            {"weight": 4.0},
            {"priority": 1},
            {"slo": 0.01},
            {"deadline": 0.02},
            {"rate": 100.0, "burst": 1},
            {"max_pending": 2},
            {"reserve": 0.1},
            {"reserve": 0.05, "slo": 0.01},
        ]
    ),
    st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(
    arrivals=st.lists(requests, max_size=60),
    most=st.integers(1, 8),
    lanes=st.integers(1, 3),
    isolation=st.sampled_from(["off", "priority", "caps", "green"]),
    segment=st.sampled_from([None, 0.002]),
    wait=st.sampled_from([0.0, 0.004]),
    seed=st.integers(0, 1000),
    jumps=st.lists(st.tuples(st.floats(0.0, 1.0), st.floats(-0.5, 0.5)), max_size=3),
)
def test_whatever_comes_everybody_is_served_or_told(
    arrivals: list[tuple[int, str, float, dict[str, Any], bool]],
    most: int,
    lanes: int,
    isolation: str,
    segment: float | None,
    wait: float,
    seed: int,
    jumps: list[tuple[float, float]],
) -> None:
    draw = random.Random(seed)
    day = Day(
        Settings(
            max_bundle=most,
            max_wait=wait,
            linger=0.002,
            in_flight=2,
            lanes=lanes,
            isolation=isolation,
            segment=segment,
        ),
        lambda key, slots: 1e-3 + 1e-3 * slots,
        faulty=lambda key: draw.random() < 0.1,
        guilty=lambda: draw.random() < 0.05,
        slower=lambda: 10.0 if draw.random() < 0.1 else 1.0,
    )

    def jump(by: float) -> None:
        day.skew += by

    now = 0.0
    for tenant, key, gap, limits, gives_up in arrivals:
        now += gap
        quota = Quota(f"t{tenant}", **limits)

        def arrive(key: str = key, quota: Quota = quota, gives_up: bool = gives_up) -> None:
            request = day.submit(key, quota, client=hash(quota.tenant))
            if request is not None and gives_up:
                day.at(day.now + 2e-3, lambda: day.cancel(request))

        day.at(now, arrive)
    for moment, by in jumps:
        day.at(moment, lambda by=by: jump(by))
    day.run()
    assert all(request.out for request in day.requests)
    check_counts(day)
    assert len(day.requests) + sum(day.refused.values()) == len(arrivals)

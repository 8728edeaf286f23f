"""Who is admitted with a deadline is served in time, also where the host and not the device is too slow."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from simulated_day import Day

from torch_mux.settings import Settings
from torch_mux.types import Quota

#: Host seconds of a bundle, of each of its requests, and of a submission; more than the device takes.
BUNDLE, SLOT, SUBMISSION = 120e-6, 40e-6, 20e-6
CAPACITY = 64 / (BUNDLE + 64 * (SLOT + SUBMISSION))
DEADLINE = 0.02


def device(key: str, slots: int) -> float:
    return 330e-6 + 33e-6 * slots


@dataclass
class Served:
    """What came of open-loop requests.

    Attributes:
        ends: by tenant and outcome, refusals among them.
        moments: (arrival, outcome) of each.
        offered: by tenant.
    """

    day: Day
    ends: dict[str, Counter[str]] = field(default_factory=dict)
    moments: list[tuple[float, str]] = field(default_factory=list)
    offered: Counter[str] = field(default_factory=Counter)

    def note(self, tenant: str, arrival: float, outcome: str) -> None:
        self.ends.setdefault(tenant, Counter())[outcome] += 1
        self.moments.append((arrival, outcome))

    def total(self) -> Counter[str]:
        return sum(self.ends.values(), Counter())

    def met(self) -> float:
        total = self.total()
        return total["ok"] / (total["ok"] + total["late"] + total["EXPIRED"])

    def between(self, begin: float, end: float) -> Counter[str]:
        return Counter(outcome for moment, outcome in self.moments if begin <= moment < end)


def serve(
    rates: Mapping[Quota, Callable[[float], float]],
    seconds: float,
    sending: Callable[[float, int], float] = lambda now, slots: BUNDLE + SLOT * slots,
    seed: int = 0,
    **options: Any,
) -> Served:
    """Poisson arrivals of each quota at a rate that changes, served by a host that takes its time."""
    draw = random.Random(seed)
    day = Day(Settings(), device, sending=lambda slots: sending(day.now, slots), **options)
    served = Served(day)

    def ended(request: Any) -> None:
        done = request.state.name == "DONE"
        outcome = ("ok" if request.due >= day.clock else "late") if done else request.state.name
        served.note(request.quota.tenant, request.arrival, outcome)

    def ask(quota: Quota, client: int) -> None:
        served.offered[quota.tenant] += 1
        if day.submit("net", quota, client) is None:
            served.note(quota.tenant, day.clock, "refused")

    day.on_end = ended
    for client, (quota, rate) in enumerate(rates.items()):
        now = 0.0
        while (now := now + draw.expovariate(max(1e-9, rate(now)))) < seconds:
            day.at(now, lambda quota=quota, client=client: ask(quota, client))  # type: ignore[misc]
    day.run()
    return served


def tenants(load: Callable[[float], float], count: int = 16) -> dict[Quota, Callable[[float], float]]:
    """Equal tenants who together ask for so much of the host's capacity."""
    return {
        Quota(f"t{number}", deadline=DEADLINE): lambda now: load(now) * CAPACITY / count
        for number in range(count)
    }


@pytest.mark.parametrize("load", [1.1, 1.3, 2.0])
def test_a_host_that_is_overloaded_meets_what_it_admits_and_serves_what_it_can(load: float) -> None:
    served = serve(tenants(lambda now: load), 2.0, submitting=SUBMISSION)
    assert served.met() >= 0.999
    assert served.total()["ok"] >= 0.9 * CAPACITY * 2.0
    assert served.total()["refused"] > 0


def test_at_nine_tenths_of_the_load_hardly_anybody_is_refused() -> None:
    served = serve(tenants(lambda now: 0.9), 2.0, submitting=SUBMISSION)
    assert served.met() >= 0.999
    assert served.total()["ok"] >= 0.96 * sum(served.offered.values())


def test_refusals_that_cost_the_host_time_too_bring_no_collapse() -> None:
    """Before a sudden overload something is known: who is new is let in."""
    load = tenants(lambda now: 3.0 if now > 0.1 else 0.3)
    served = serve(load, 1.0, submitting=SUBMISSION, refusing=SUBMISSION / 4)
    left = 1.0 - 2.0 * CAPACITY * SUBMISSION / 4  # of the host for those who are not refused
    assert served.met() >= 0.999
    assert served.between(0.1, 1.0)["ok"] >= 0.9 * 0.9 * left * CAPACITY


@pytest.mark.parametrize("seed", range(3))
def test_a_device_that_is_overloaded_meets_what_it_admits(seed: int) -> None:
    most = 64 / device("net", 64)
    rates = {Quota(f"t{number}", deadline=DEADLINE): lambda now: 1.3 * most / 16 for number in range(16)}
    served = serve(rates, 1.0, lambda now, slots: 20e-6 + 5e-6 * slots, seed)
    assert served.met() >= 0.999
    assert served.total()["ok"] >= 0.9 * most


def test_after_an_overload_everybody_is_admitted_again_at_once() -> None:
    served = serve(tenants(lambda now: 2.0 if now < 0.5 else 0.5), 1.0, submitting=SUBMISSION)
    assert served.between(0.1, 0.5)["refused"] > 0
    after = served.between(0.5 + DEADLINE, 1.0)
    assert after["refused"] <= 0.005 * sum(after.values())


@pytest.mark.parametrize("times", [6.0, 40.0])
def test_after_a_slow_phase_everybody_is_admitted_again_at_once(times: float) -> None:
    """Nearly all are refused while it lasts: somebody has to find out that it is over."""

    def sending(now: float, slots: int) -> float:
        return (times if 0.5 < now < 1.0 else 1.0) * (BUNDLE + SLOT * slots)

    served = serve(tenants(lambda now: 0.5), 1.6, sending, submitting=SUBMISSION)
    during, after = served.between(0.55, 1.0), served.between(1.15, 1.6)
    assert during["refused"] > 0.3 * sum(during.values())
    assert after["refused"] <= 0.01 * sum(after.values())


def test_a_tenant_who_asks_for_too_much_is_refused_and_the_others_are_not() -> None:
    rates = tenants(lambda now: 0.4)
    rates[Quota("greedy", deadline=DEADLINE)] = lambda now: 2.0 * CAPACITY
    served = serve(rates, 1.0, submitting=SUBMISSION)
    assert served.met() >= 0.999
    assert served.ends["greedy"]["refused"] > 0.4 * served.offered["greedy"]
    for tenant in set(served.offered) - {"greedy"}:
        assert served.ends[tenant]["refused"] <= 0.02 * served.offered[tenant]


def test_a_higher_class_is_not_refused_for_the_queue_of_a_lower_one() -> None:
    rates = tenants(lambda now: 1.5)
    rates[Quota("urgent", deadline=DEADLINE, priority=1)] = lambda now: 200.0
    served = serve(rates, 1.0, submitting=SUBMISSION)
    assert served.ends["urgent"]["refused"] <= 0.05 * served.offered["urgent"]
    assert served.ends["urgent"]["late"] == served.ends["urgent"]["EXPIRED"] == 0


def test_who_may_be_served_late_is_never_refused() -> None:
    rates = {Quota(f"t{number}", slo=DEADLINE): lambda now: 0.1 * CAPACITY for number in range(16)}
    served = serve(rates, 0.3, submitting=SUBMISSION)
    total = served.total()
    assert total["refused"] == total["EXPIRED"] == 0
    assert total["ok"] + total["late"] == sum(served.offered.values())


def test_a_host_with_stalls_is_not_refused_to_death() -> None:
    """Stalls make some late whatever is refused: more are in time than without admission, not fewer."""
    draw = random.Random(1)

    def sending(now: float, slots: int) -> float:
        return BUNDLE + SLOT * slots + (8e-3 * draw.random() if draw.random() < 0.02 else 0.0)

    served = serve(tenants(lambda now: 0.6), 2.0, sending, submitting=SUBMISSION)
    assert served.met() >= 0.99
    assert served.total()["ok"] >= 0.9 * sum(served.offered.values())

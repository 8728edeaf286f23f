"""Weights hold for clients who ask again only when the device has answered, and it hardly rests for that."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import pytest
import torch
from backlogged import contended, hold_to_the_bound, longest_stretch, served
from clocks import Punctual
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import Queue, Ticket
from simulated_gpu import Timing, simulated_engine
from simulated_loop import Client, ClosedLoop
from slow_device import slow

from torch_mux.runtime.engine import Engine
from torch_mux.runtime.scheduler.absent import Absent
from torch_mux.runtime.scheduler.base import Busy, Issue, LaneLoad, Later, View
from torch_mux.runtime.scheduler.policy import FairPolicy
from torch_mux.runtime.timeline import BundleSpan, RequestSpan, Timeline, recorders
from torch_mux.settings import Settings
from torch_mux.types import Quota

#: Fixed seconds and seconds a slot of four architectures.
COSTS = {"a": (4e-4, 6e-5), "b": (3e-4, 1e-4), "c": (7e-4, 6e-4), "d": (6e-4, 6e-4)}
LINGER = 200e-6


def seconds(key: str, slots: int) -> float:
    fixed, each = COSTS[key]
    return fixed + each * slots


@pytest.mark.parametrize("clients", [1, 2, 16])
@pytest.mark.parametrize("flying", [1, 2])
def test_four_architectures_share_by_weight(clients: int, flying: int) -> None:
    tenants = {f"t{w}": Client(key, w, clients) for key, w in zip("abcd", (1.0, 2.0, 4.0, 8.0), strict=True)}
    loop = ClosedLoop(tenants, seconds, linger=LINGER, in_flight=flying)
    loop.run(0.2)
    loop.begin()
    loop.run(0.2 + 1.5 * clients)
    for name, share in loop.shares().items():
        assert share == pytest.approx(loop.granted(name), rel=0.05)
    # One bundle in flight cannot hide the clients' way back: a tenth of the shortest bundle.
    assert sum(loop.served.values()) > (0.95 if flying == 2 else 0.9) * 1.5 * clients
    assert loop.longest_idle <= LINGER + 1e-9


@pytest.mark.parametrize("clients", [1, 4, 16])
def test_equal_weights_get_equal_device_time(clients: int) -> None:
    tenants = {f"t{number}": Client("abcd"[number % 4], 1.0, clients) for number in range(8)}
    loop = ClosedLoop(tenants, seconds, linger=LINGER, in_flight=2)
    loop.run(0.2)
    loop.begin()
    loop.run(0.2 + 1.5 * clients)
    shares = loop.shares().values()
    assert max(shares) / min(shares) < 1.02
    assert sum(loop.served.values()) > 0.97 * 1.5 * clients


@pytest.mark.parametrize("depth", [32, 64])
def test_equal_weights_after_staggered_joins_over_four_architectures(depth: int) -> None:
    """As the serving bench measures it: four tenants of each, all with more than two bundles pending."""
    tenants = {f"t{number}": Client("abcd"[number // 4], 1.0, depth) for number in range(16)}
    loop = ClosedLoop(tenants, seconds, linger=LINGER, in_flight=2, max_bundle=depth // 4)
    for number, name in enumerate(tenants):
        loop.joins(name, 0.04 * number)
    loop.run(1.0)
    loop.begin()
    loop.run(2.5)
    shares = loop.shares().values()
    assert max(shares) / min(shares) < 1.02
    assert loop.longest_idle == 0.0


def test_one_program_whose_bundles_are_full_is_shared_by_weight() -> None:
    tenants = {f"t{weight}": Client("a", weight, 32) for weight in (1.0, 2.0, 4.0, 8.0)}
    loop = ClosedLoop(tenants, seconds, linger=LINGER, max_bundle=16)
    loop.run(2.0)
    for name, share in loop.shares().items():
        assert share == pytest.approx(loop.granted(name), rel=0.05)


def test_clients_who_all_fit_one_bundle_of_their_program_do_not_compete() -> None:
    tenants = {f"t{weight}": Client("a", weight, 4) for weight in (1.0, 8.0)}
    loop = ClosedLoop(tenants, seconds, linger=LINGER)
    loop.run(0.5)
    assert loop.shares() == {"t1.0": pytest.approx(0.5, rel=0.01), "t8.0": pytest.approx(0.5, rel=0.01)}
    assert loop.policy._times == {}
    assert Counter(len(issue.requests) for issue in loop.device.issues).most_common(1)[0][0] == 8


def test_one_client_among_many_of_its_program_holds_nobody_back() -> None:
    tenants = {"many": Client("a", 1.0, 15), "one": Client("a", 1.0, 1)}
    loop = ClosedLoop(tenants, seconds, linger=LINGER)
    loop.run(0.5)
    assert loop.answers > 0.9 * 0.5 / (seconds("a", 16) + 70e-6) * 16


costs = st.tuples(st.sampled_from([0.0, 2e-4, 1e-3]), st.sampled_from([1e-4, 5e-4, 2e-3]))


@settings(max_examples=40, deadline=None)
@given(
    tenants=st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from([0.5, 1.0, 2.0, 8.0]), st.integers(1, 4)),
        min_size=2,
        max_size=5,
    ),
    costs=st.lists(costs, min_size=3, max_size=3),
    flying=st.integers(1, 3),
    most=st.integers(1, 8),
    linger=st.sampled_from([0.0, 5e-5, 2e-4, 1e-3]),
    way=st.tuples(st.floats(1e-6, 3e-3), st.floats(1e-6, 3e-3)),
)
def test_the_device_rests_no_longer_than_the_linger(
    tenants: list[tuple[int, float, int]],
    costs: list[tuple[float, float]],
    flying: int,
    most: int,
    linger: float,
    way: tuple[float, float],
) -> None:
    """Whoever they are and however late they come back, while somebody is pending."""
    loop = ClosedLoop(
        {f"t{number}": Client(f"p{one}", weight, n) for number, (one, weight, n) in enumerate(tenants)},
        lambda key, slots: costs[int(key[1])][0] + costs[int(key[1])][1] * slots,
        lambda draw: draw.uniform(min(way), max(way)),
        in_flight=flying,
        max_bundle=most,
        linger=linger,
    )
    loop.run(0.2)
    assert loop.answers > 0
    assert loop.longest_idle <= linger + 1e-9


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 8.0]), min_size=2, max_size=5),
    clients=st.lists(st.integers(1, 3), min_size=5, max_size=5),
    costs=st.lists(costs, min_size=5, max_size=5),
    shared=st.booleans(),
    flying=st.integers(1, 2),
)
def test_no_two_clients_who_come_back_in_time_lag_more_than_the_bound(
    weights: list[float],
    clients: list[int],
    costs: list[tuple[float, float]],
    shared: bool,
    flying: int,
) -> None:
    """See FairPolicy; forecasts are exact here."""
    keys = [f"p{0 if shared and number == len(weights) - 1 else number}" for number in range(len(weights))]
    if len(set(keys)) == 1:
        keys[-1] = "p1"
    tenants = {
        f"t{number}": Client(key, weight, clients[number])
        for number, (key, weight) in enumerate(zip(keys, weights, strict=True))
    }

    def cost(key: str, slots: int) -> float:
        fixed, each = costs[int(key[1])]
        return fixed + each * slots

    loop = ClosedLoop(tenants, cost, lambda draw: draw.uniform(1e-6, 9e-5), linger=1e-4, in_flight=flying)
    for key in set(keys):
        for slots in range(1, 8):
            for _ in range(4):
                loop.policy.predictor.observe(key, slots, (16, 0), cost(key, slots))
    most = {key: sum(one.clients for one in tenants.values() if one.key == key) for key in set(keys)}
    longest = max(cost(key, slots) for key, slots in most.items())
    bound = {name: (2 * longest + cost(one.key, 1)) / one.weight for name, one in tenants.items()}
    loop.run(0.05)
    loop.begin()
    for step in range(1, 60):
        loop.run(0.05 + 5e-3 * step)
        # Services are seen when a bundle ends and charged when it goes out: what flies is in both or neither.
        flies = {name: 2 * longest / one.weight for name, one in tenants.items()}
        for f, g in combinations(tenants, 2):
            lag = [loop.served[name] / tenants[name].weight for name in (f, g)]
            assert abs(lag[0] - lag[1]) <= bound[f] + bound[g] + flies[f] + flies[g] + 1e-9


def issue(policy: FairPolicy, key: str, tenant: str, now: float, seconds: float = 1e-3) -> Issue:
    """A bundle of one that goes out and is charged."""
    made = Issue(key, [ticket(tenant, now)], 1.0, start=0.0)
    policy.predictor.observe(key, 1, (16, 0), seconds)
    policy.issued(made, now)
    return made


def ticket(tenant: str, now: float) -> Ticket:
    return Ticket(now, 1, Quota(tenant))


def queue(key: str, tenant: str, now: float) -> Queue:
    return Queue(key, [ticket(tenant, now)])


def ahead() -> tuple[FairPolicy, Issue]:
    """A policy in which one tenant has had four bundles, and the other has one under way."""
    policy = FairPolicy()
    policy._linger = LINGER
    for _ in range(4):
        policy.completed(issue(policy, "a", "fast", 0.0), 0.0, 1e-3)
    return policy, issue(policy, "b", "slow", 1.0)


def test_who_is_ahead_waits_for_who_is_under_way_and_then_for_the_linger() -> None:
    policy, flying = ahead()
    options = Settings(linger=LINGER, in_flight=2)
    view = View([queue("a", "fast", 1.0)], (LaneLoad(1),))
    assert policy.form(view, 1.0, options) == Busy({}, 1.001)
    assert isinstance(policy.form(view, 1.002, options), Issue), "it is overdue"
    policy.completed(flying, 1.001, 1e-3)
    view = View([queue("a", "fast", 1.0)], (LaneLoad(),))
    assert policy.form(view, 1.0011, options) == Later(1.001 + LINGER, {})
    assert isinstance(policy.form(view, 1.001 + LINGER, options), Issue)
    # Without a linger nobody waits once the device is idle, and with a clock that was put back neither.
    assert isinstance(policy.form(view, 0.5, options), Issue)
    assert isinstance(policy.form(view, 1.0011, Settings(linger=0.0)), Issue)


def test_who_does_not_come_back_is_awaited_less_and_less() -> None:
    policy, now, held = FairPolicy(), 1.0, 0
    options = Settings(linger=LINGER)
    policy._linger = LINGER
    for _ in range(64):
        for _ in range(4):
            policy.completed(issue(policy, "a", "fast", now), now, 1e-3)
        late = issue(policy, "b", "late", now)
        now += 1e-3
        policy.completed(late, now, 1e-3)
        view = View([queue("a", "fast", now)], (LaneLoad(),))
        held += isinstance(policy.form(view, now + 1e-6, options), Later)
        now += 1.0
    assert 0 < held < 10


def test_a_bundle_that_did_not_run_is_expected_by_nobody() -> None:
    absent = Absent()
    made = Issue("b", [ticket("x", 0.0)], 1.0)
    absent.issued(made, 0.0, 1.0, LINGER)
    assert absent.anybody(0.0, LINGER)
    assert not absent.anybody(0.0, LINGER, but="b")
    absent.completed(made, 1.0, 0.0, 1.0)
    assert not absent.anybody(1.0, LINGER)


WEIGHTS = {"one": 1.0, "two": 2.0, "four": 4.0, "eight": 8.0}


@pytest.mark.parametrize("branches", [1, 4])
def test_threads_before_a_slow_device_share_it_by_weight(lab: Any, branches: int) -> None:
    """Two threads of each tenant, each of which asks again when it has its answer."""
    clock = Punctual()
    engine, device = slow(lab, clock, linger=0.0125, in_flight=2, branches=branches)
    times = {"one": 0.002, "two": 0.0035, "four": 0.0045, "eight": 0.003}
    models = {name: lab.Affine(2.0) for name in WEIGHTS}
    for name in WEIGHTS:
        engine.register(lab.program(name))
    assert engine.quiesce(10)
    device.seconds_of = lambda bundle: times[bundle.served.program.name]
    device.on_end = lambda flight: clock.leaves(len(flight.bundle.requests))
    failed: list[BaseException] = []
    done = threading.Event()

    def client(name: str) -> None:
        first, quota = True, Quota(name, weight=WEIGHTS[name])
        try:
            while not done.is_set():
                ended = threading.Event()
                request = lab.submit(engine, lab.program(name), models[name], quota=quota)
                request.add_done_callback(lambda _, ended=ended: ended.set())
                if not first:
                    clock.returns()
                first = False
                request.result()
                assert ended.wait(20)
        except BaseException as error:
            failed.append(error)
        clock.returns()

    def seconds_at(moment: float) -> dict[str, float]:
        lab.until(lambda: clock() >= moment, 60.0)
        tenants = engine.stats().tenants
        return {name: tenants[name].device_seconds for name in WEIGHTS}

    begun = clock()
    threads = [
        threading.Thread(target=client, args=(name,), daemon=True) for name in WEIGHTS for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    before, after = seconds_at(begun + 0.125), seconds_at(begun + 1.125)
    done.set()
    for thread in threads:
        thread.join(60)
    assert not failed
    got = {name: after[name] - before[name] for name in WEIGHTS}
    for name in WEIGHTS:
        assert got[name] / sum(got.values()) == pytest.approx(WEIGHTS[name] / 15, rel=0.15)


def flood(engine: Engine, lab: Any, device: str, inside: Callable[[], Any]) -> list[BundleSpan]:
    """Bundles while two threads of each tenant have four requests under way all the time.

    Until everybody has waited through enough of them.

    Args:
        inside: the context that a thread submits in.
    """
    models = {name: lab.Affine(2.0, device) for name in WEIGHTS}
    programs = {name: lab.program(name, device=device) for name in WEIGHTS}
    failed: list[BaseException] = []
    done = threading.Event()

    def client(name: str) -> None:
        ended, quota = threading.Semaphore(4), Quota(name, weight=WEIGHTS[name])
        try:
            with inside():
                while not done.is_set():
                    assert ended.acquire(timeout=20)
                    request = lab.submit(engine, programs[name], models[name], quota=quota)
                    request.add_done_callback(lambda _: ended.release())
                    engine.wait([request])
        except BaseException as error:
            failed.append(error)

    threads = [
        threading.Thread(target=client, args=(name,), daemon=True) for name in WEIGHTS for _ in range(2)
    ]
    with recorders.record(Timeline()) as timeline:
        for thread in threads:
            thread.start()
        last = time.monotonic() + 30.0
        while len(contended(timeline.spans, WEIGHTS)) < ENOUGH and time.monotonic() < last:
            time.sleep(0.2)
        done.set()
        for thread in threads:
            thread.join(60)
    assert not failed
    return timeline.spans


ENOUGH = 200


def check(spans: Sequence[BundleSpan], flying: int) -> None:
    """That they are served by weight while everybody waits."""
    stretch = contended(spans, WEIGHTS)
    assert len(stretch) >= ENOUGH, f"of {len(spans)} bundles"
    hold_to_the_bound(stretch, WEIGHTS, flying)
    got = served(stretch)
    assert sorted(got, key=got.__getitem__) == sorted(WEIGHTS, key=WEIGHTS.__getitem__)


def test_threads_before_a_simulated_gpu_share_it_by_weight(lab: Any) -> None:
    seconds = {"one": 5e-3, "two": 3e-3, "four": 4e-3, "eight": 3.5e-3}
    timing = Timing(bundle=lambda name, slots: seconds[name], capture=1e-3)
    with simulated_engine(timing, Punctual(), max_bundle=1, branches=1) as (engine, _):
        check(flood(engine, lab, "cpu", contextlib.nullcontext), engine.settings.in_flight)


def test_the_bound_does_not_hold_for_who_is_served_in_turn() -> None:
    spans = []
    for number in range(200):
        name = list(WEIGHTS)[number % 4]
        asked = RequestSpan(name, 0.0, "done", False)
        spans.append(BundleSpan(name, name, "cpu", 0, 1.0, number * 1e-3, number * 1e-3, 1e-3, (asked,)))
    assert len(longest_stretch(spans, list(WEIGHTS))) == 197  # then the first has nothing pending any more
    with pytest.raises(AssertionError):
        hold_to_the_bound(spans, WEIGHTS, 2)


@pytest.mark.gpu
def test_threads_before_a_gpu_share_it_by_weight(lab: Any) -> None:
    """Four programs of different length; their kernels only wait."""
    engine = lab.gpu_engine(capture=False, max_bundle=1, branches=1)
    cycles = {"one": 5_000_000, "two": 3_000_000, "four": 4_000_000, "eight": 3_500_000}
    for name in WEIGHTS:
        engine.register(lab.program(name, device="cuda:0"))
    assert engine.quiesce(60)
    for name, plan in lab.plans.items():
        plan.before = lambda inputs, name=name: torch.cuda._sleep(cycles[name])

    # On a common stream everybody would wait for everybody.
    check(flood(engine, lab, "cuda:0", lambda: torch.cuda.stream(torch.cuda.Stream())), 2)

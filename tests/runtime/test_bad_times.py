"""Clocks that jump, deadlines that have passed, first runs that take a minute, results that nobody reads."""

from __future__ import annotations

import gc
import random
import threading
import time
import weakref
from typing import Any

import pytest
import torch
from simulated_day import Day
from simulated_loop import Client, ClosedLoop
from slow_device import slow

import torch_mux
from torch_mux.errors import DeadlineExceeded, DeadlineUnattainable
from torch_mux.runtime.quarantine import Quarantine
from torch_mux.runtime.scheduler.bucket import TokenBucket
from torch_mux.settings import Settings
from torch_mux.types import Quota


class Clock:
    """Real time, put forward or back."""

    def __init__(self) -> None:
        self.skew = 0.0

    def __call__(self) -> float:
        return time.perf_counter() + self.skew


@pytest.mark.parametrize("jump", [-3600.0, 3600.0])
@pytest.mark.parametrize("waiting", [True, False])
def test_a_clock_that_jumps_delays_and_loses_nobody(lab: Any, jump: float, waiting: bool) -> None:
    """Held for companions or for its rate, due at some time, or under way: nobody waits for an hour."""
    clock = Clock()
    engine, device = slow(lab, clock=clock, max_wait=0.3, linger=0.05)
    device.seconds = 0.005
    program, model = lab.program(), lab.Affine(2.0)
    rated = Quota("rated", rate=8.0, burst=1)
    requests = [lab.submit(engine, program, model, 3.0, rated) for _ in range(2)]
    requests.append(lab.submit(engine, program, model, 3.0, Quota("due", slo=0.25)))
    requests.append(lab.submit(engine, program, model, 3.0, Quota("strict", deadline=300.0)))
    engine.kick()
    timer = threading.Timer(0.05, lambda: setattr(clock, "skew", jump))
    timer.start()
    started = time.perf_counter()
    if waiting:
        got = lab.answers(requests)
    else:
        lab.until(lambda: all(request.out for request in requests), 10.0)
        got = lab.answers(requests)
    assert time.perf_counter() - started < 10.0
    assert got[:3] == [6.0] * 3
    assert got[3] == 6.0 or (jump > 0 and got[3] is DeadlineExceeded)
    # And life goes on afterwards.
    assert lab.answers([lab.submit(engine, program, model, 3.0, rated)]) == [6.0]
    assert lab.answers([lab.submit(engine, program, model, 3.0)]) == [6.0]
    lab.until(lambda: sum(got.pending for got in engine.stats().tenants.values()) == 0)


def test_a_clock_that_is_put_back_ends_a_quarantine_and_starves_no_bucket() -> None:
    quarantine = Quarantine(lambda: 1)
    key = ("a", "Net")
    quarantine.failed(key, 1000.0, ValueError())
    assert quarantine.held(key, 1000.05) is not None
    assert quarantine.held(key, 10.0) is None and quarantine.tenants(10.0) == {}
    bucket = TokenBucket()
    bucket.take(1000.0, 10.0, 1)
    now, waits = 10.0, []
    for _ in range(50):
        waits.append(bucket.take(now, 10.0, 1))
        now += 0.2
    assert max(waits[1:]) == 0.0


def test_a_deadline_in_the_past_is_refused_or_dropped_and_costs_no_device_time(lab: Any) -> None:
    for value in (0, -1.0, "-5ms"):
        with pytest.raises(torch_mux.MuxError):
            torch_mux.quota("late", deadline=value)
    engine, program, model = lab.engine(), lab.program(), lab.Affine(2.0)
    for _ in range(4):
        lab.call(engine, program, model)
    ran = len(lab.plans["affine"].bundles)
    with pytest.raises((DeadlineExceeded, DeadlineUnattainable)):
        lab.submit(engine, program, model, quota=Quota("late", deadline=1e-9)).result()
    assert len(lab.plans["affine"].bundles) == ran
    late = engine.stats().tenants["late"]
    assert late.accepted == late.expired and late.pending == 0


def test_a_model_whose_first_run_takes_a_minute_delays_only_itself_on_another_lane() -> None:
    """Two lanes: while one is taken for a minute the other goes on; afterwards shares are even again."""
    first: list[float] = [60.0]

    def seconds(key: str, slots: int) -> float:
        return first.pop() if key == "new" and first else 1e-3

    day = Day(Settings(linger=200e-6, in_flight=1, lanes=2), seconds)
    draw = random.Random(3)
    for tenant in ("new", "a", "b"):
        now = 0.0
        while now < 70.0:
            now += draw.uniform(0.01, 0.03)
            day.at(now, lambda tenant=tenant: day.submit(tenant, Quota(tenant), hash(tenant)))
    longest: list[float] = [0.0]

    def ended(request: Any) -> None:
        if request.quota.tenant != "new":
            longest.append(day.clock - request.arrival)

    day.on_end = ended
    day.run()
    assert max(longest) < 0.05
    assert all(request.out for request in day.requests)
    assert day.policy.predictor.forecast("new", 1, (16, 0)).median < 1.0


def test_a_long_first_run_is_paid_for_and_then_forgotten() -> None:
    def seconds(key: str, slots: int) -> float:
        return 1.0 if key == "new" and loop.device.now < 0.5 else 1e-3

    loop = ClosedLoop({"new": Client("new"), "old": Client("old")}, seconds, linger=2e-4)
    loop.joins("new", 0.1)
    loop.run(1.2)
    loop.begin()
    loop.run(1.6)
    assert loop.shares()["old"] > 0.98, "the others go on at once, until they have had as much"
    loop.run(2.2)
    loop.begin()
    loop.run(2.8)
    assert loop.shares()["new"] == pytest.approx(0.5, rel=0.02)


def test_results_that_nobody_reads_are_let_go(lab: Any) -> None:
    engine, program, model = lab.engine(), lab.program(), lab.Affine(2.0)
    kept: list[weakref.ref[Any]] = []
    for _ in range(3):
        requests = [lab.submit(engine, program, model, quota=Quota(f"t{n}")) for n in range(50)]
        engine.kick()
        lab.until(lambda requests=requests: all(request.done() for request in requests))
        kept += [weakref.ref(request.outputs[0]) for request in requests]
        del requests
    gc.collect()
    lab.until(lambda: gc.collect() is not None and not any(one() is not None for one in kept))
    assert sum(got.pending for got in engine.stats().tenants.values()) == 0


def test_ten_thousand_pending_requests_of_many_programs(lab: Any) -> None:
    """Nobody scans the backlog: a quadratic step would take minutes here."""
    engine = lab.engine(max_bundle=8)
    programs = [lab.program(f"p{number}") for number in range(20)]
    for program in programs:
        engine.register(program)
    assert engine.quiesce(10)
    model = lab.Affine(2.0)
    requests = [
        lab.submit(engine, programs[n % 20], model, float(n % 7), Quota(f"t{n % 64}")) for n in range(10_000)
    ]
    engine.wait(requests[:1])
    engine.wait(requests)
    assert all(request.result()[0][0].item() == 2.0 * (n % 7) for n, request in enumerate(requests))
    assert torch.equal(requests[-1].result()[1], requests[-1].result()[1])

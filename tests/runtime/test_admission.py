"""Rates, bounded queues, deadlines and reserves; and every accepted request ends in exactly one way."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torch_mux.errors import (
    CancelledRequest,
    DeadlineExceeded,
    DeadlineUnattainable,
    ExecutionFailed,
    InvalidQuota,
    Overloaded,
    RateExceeded,
)
from torch_mux.runtime import dispatch
from torch_mux.runtime.scheduler.bucket import TokenBucket
from torch_mux.types import Quota


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def ready(lab: Any, clock: Any = time.perf_counter, **options: Any) -> tuple[Any, Any, Any]:
    engine, program = lab.engine(clock, **options), lab.program()
    engine.register(program)
    assert engine.quiesce(10)
    return engine, program, lab.Affine(2.0)


def tenant(engine: Any, name: str) -> Any:
    return engine.stats().tenants[name]


def test_requests_above_the_rate_are_refused_until_there_is_a_token(lab: Any) -> None:
    clock = Clock()
    engine, program, model = ready(lab, clock)
    quota = Quota("a", rate=10.0, burst=2, excess="refuse")
    for _ in range(2):
        lab.submit(engine, program, model, quota=quota)
    with pytest.raises(RateExceeded, match=r"'a'.*rate=10.*burst=2.*in 0\.1 s"):
        lab.submit(engine, program, model, quota=quota)
    lab.submit(engine, program, model, quota=Quota("other")).result()
    clock.now += 0.1
    lab.submit(engine, program, model, quota=quota).result()
    engine.close()
    assert (tenant(engine, "a").accepted, tenant(engine, "a").ok, tenant(engine, "a").refused) == (3, 3, 1)


def test_requests_above_the_rate_are_held_until_their_time(lab: Any) -> None:
    clock = Clock()
    engine, program, model = ready(lab, clock)
    quota = Quota("a", rate=10.0, burst=1)
    requests = [lab.submit(engine, program, model, float(n), quota) for n in range(3)]
    engine.kick()
    lab.until(requests[0].done)
    lab.submit(engine, program, model).result()
    assert not requests[1].done()
    for later in requests[1:]:
        clock.now += 0.1001
        engine.kick()
        lab.until(later.done)
    assert [request.result()[0][0].item() for request in requests] == [0.0, 2.0, 4.0]


def test_a_caller_of_a_held_request_waits_for_it_in_real_time(lab: Any) -> None:
    engine, program, model = ready(lab)
    quota = Quota("a", rate=50.0, burst=1)
    started = time.perf_counter()
    answers = [lab.submit(engine, program, model, float(n), quota) for n in range(4)]
    assert [request.result()[0][0].item() for request in answers] == [0.0, 2.0, 4.0, 6.0]
    assert 0.055 < time.perf_counter() - started < 5.0


def test_a_hold_ends_though_the_dispatcher_sleeps_for_others(lab: Any) -> None:
    engine, program, model = ready(lab, max_wait=30.0)
    other = lab.program("other")
    engine.register(other)
    assert engine.quiesce(10)
    quota = Quota("a", rate=50.0, burst=1)
    first = lab.submit(engine, program, model)
    engine.kick()  # somebody sleeps for 30 seconds now
    time.sleep(0.05)
    held = [lab.submit(engine, other, model, quota=quota) for _ in range(2)]
    engine.kick()
    lab.until(lambda: len(held[1].served.queues[0].requests) == 2)
    assert not first.done()
    engine.close()
    assert held[1].done() and first.done()


def test_held_requests_can_be_cancelled_and_are_served_when_the_engine_closes(lab: Any) -> None:
    clock = Clock()
    engine, program, model = ready(lab, clock)
    quota = Quota("a", rate=1e-3, burst=1)
    requests = [lab.submit(engine, program, model, float(n), quota) for n in range(3)]
    assert requests[1].cancel()
    with pytest.raises(CancelledRequest):
        requests[1].result()
    engine.close()
    assert requests[2].result()[0][0].item() == 4.0
    got = tenant(engine, "a")
    assert (got.accepted, got.ok, got.cancelled, got.pending) == (3, 2, 1, 0)


def test_held_requests_of_a_program_that_does_not_compile_fail(lab: Any) -> None:
    lab.broken.add("broken")
    lab.slow["broken"] = threading.Event()
    engine, program, model = lab.engine(Clock()), lab.program("broken"), lab.Affine()
    requests = [lab.submit(engine, program, model, quota=Quota("a", rate=1e-3, burst=1)) for _ in range(2)]
    lab.slow["broken"].set()
    for request in requests:
        with pytest.raises(ExecutionFailed, match="no code"):
            request.result()


def test_a_hold_longer_than_the_deadline_is_refused_at_once(lab: Any) -> None:
    engine, program, model = ready(lab, Clock())
    quota = Quota("a", rate=1.0, burst=1, deadline=0.5)
    lab.submit(engine, program, model, quota=quota)
    with pytest.raises(DeadlineUnattainable, match=r"'a'.*0\.5 s.*rate of 1 a second holds it for 1 s.*slo"):
        lab.submit(engine, program, model, quota=quota)


def test_a_tenants_queue_is_bounded(lab: Any) -> None:
    engine, program, model = ready(lab)
    quota = Quota("a", max_pending=3)
    requests = [lab.submit(engine, program, model, quota=quota) for _ in range(3)]
    with pytest.raises(Overloaded, match=r"'a' has 3 requests pending.*max_pending=3"):
        lab.submit(engine, program, model, quota=quota)
    lab.submit(engine, program, model, quota=Quota("b", max_pending=1)).result()
    engine.wait(requests)
    lab.submit(engine, program, model, quota=quota).result()


def test_a_round_is_queued_whole_or_not_at_all(lab: Any) -> None:
    engine, program, model = ready(lab)
    instance = engine.instance(program, model.tensors())
    calls = [(instance, [lab.x()], Quota("a", max_pending=3, rate=100.0, burst=4))] * 4
    with pytest.raises(Overloaded):
        engine.submit_all(calls)
    assert "a" not in engine.stats().tenants or tenant(engine, "a").accepted == 0
    engine.wait(engine.submit_all(calls[:3]))
    assert tenant(engine, "a").ok == 3


def test_the_bound_holds_for_threads_that_race(lab: Any) -> None:
    engine, program, model = ready(lab)
    quota, highest, refused = Quota("a", max_pending=5), [0], [0]
    instance = engine.instance(program, model.tensors())

    def client() -> None:
        for _ in range(100):
            try:
                request = engine.submit(instance, [lab.x()], quota)
            except Overloaded:
                refused[0] += 1
                continue
            highest[0] = max(highest[0], engine._accounting.pending("a"))
            request.result()

    threads = [threading.Thread(target=client) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert 1 <= highest[0] <= 5
    got = tenant(engine, "a")
    assert got.accepted == got.ok
    assert got.accepted + got.refused == 800


def test_a_request_that_finds_no_memory_gives_its_token_and_its_place_back(lab: Any) -> None:
    engine, program, model = ready(lab, Clock())
    quota = Quota("a", max_pending=1, rate=1.0, burst=1, excess="refuse", memory=1)
    for _ in range(3):
        with pytest.raises(Exception, match="memory=1"):
            lab.submit(engine, program, model, quota=quota)
    assert (tenant(engine, "a").accepted, tenant(engine, "a").refused) == (0, 3)


def test_what_expires_in_the_queue_never_reaches_the_device(lab: Any) -> None:
    lab.slow["slow"] = threading.Event()
    clock = Clock()
    engine, program, model = lab.engine(clock), lab.program("slow"), lab.Affine(2.0)
    late = lab.submit(engine, program, model, quota=Quota("a", deadline=1.0))
    patient = lab.submit(engine, program, model, 3.0, Quota("b", slo=1.0))
    clock.now += 2.0
    engine.kick()
    lab.until(late.done)
    with pytest.raises(DeadlineExceeded, match=r"'a' was dropped.*deadline of 1 s"):
        late.result()
    lab.slow["slow"].set()
    assert patient.result()[0][0].item() == 6.0
    assert lab.plans["slow"].bundles == [1]
    assert tenant(engine, "a").expired == 1
    assert (tenant(engine, "b").ok, tenant(engine, "b").late) == (0, 1)


def test_a_waiting_caller_is_told_when_its_deadline_has_passed(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_LIVENESS", 60.0)  # he does not find out by himself
    lab.slow["slow"] = threading.Event()
    engine, program = lab.engine(), lab.program("slow")
    started = time.perf_counter()
    with pytest.raises(DeadlineExceeded):
        lab.submit(engine, program, lab.Affine(), quota=Quota("a", deadline=0.05)).result()
    assert time.perf_counter() - started < 20.0


def test_reserves_above_one_in_sum_are_refused_by_name(lab: Any) -> None:
    engine, program, model = ready(lab)
    lab.submit(engine, program, model, quota=Quota("a", reserve=0.5)).result()
    lab.submit(engine, program, model, quota=Quota("b", reserve=0.4)).result()
    with pytest.raises(InvalidQuota, match=r"add up to 1\.1, above 1 \('a' 0\.5, 'b' 0\.4, 'c' 0\.2\)"):
        lab.submit(engine, program, model, quota=Quota("c", reserve=0.2))
    lab.submit(engine, program, model, quota=Quota("b", reserve=0.3)).result()
    lab.submit(engine, program, model, quota=Quota("c", reserve=0.2)).result()
    lab.submit(engine, program, model, quota=Quota("a")).result()
    lab.submit(engine, program, model, quota=Quota("d", reserve=0.5)).result()
    engine.reset()
    lab.submit(engine, program, model, quota=Quota("e", reserve=1.0)).result()


def test_a_quota_that_changes_under_load_holds_for_what_comes_then(lab: Any) -> None:
    clock = Clock()
    engine, program, model = ready(lab, clock)
    for _ in range(4):
        lab.submit(engine, program, model, quota=Quota("a"))
    with pytest.raises(Overloaded, match="has 4 requests"):
        lab.submit(engine, program, model, quota=Quota("a", max_pending=2))
    lab.submit(engine, program, model, quota=Quota("a", max_pending=5))
    slow = [lab.submit(engine, program, model, quota=Quota("a", rate=1.0, burst=1)) for _ in range(3)]
    clock.now += 1.5
    fast = lab.submit(engine, program, model, quota=Quota("a", rate=1000.0, burst=1))
    engine.kick()
    lab.until(lambda: slow[1].done() and fast.eligible <= clock.now + 0.01)
    assert not slow[2].done()
    engine.close()
    assert slow[2].done() and fast.done()


def test_ten_thousand_pending_of_which_nobody_reads_the_results(lab: Any) -> None:
    engine, program, model = ready(lab)
    instance = engine.instance(program, model.tensors())
    quotas = [Quota(f"t{number}") for number in range(7)]
    for number in range(10_000):
        engine.submit(instance, [lab.x()], quotas[number % 7])
    engine.kick()
    lab.until(lambda: engine.stats().requests == 10_000, 60.0)
    assert [tenant(engine, quota.tenant).pending for quota in quotas] == [0] * 7


@given(
    rate=st.floats(0.5, 100.0),
    burst=st.integers(1, 10),
    steps=st.lists(st.floats(-5.0, 5.0) | st.floats(0.0, 0.1), max_size=80),
)
def test_a_bucket_lets_no_more_through_than_burst_and_rate(
    rate: float, burst: int, steps: list[float]
) -> None:
    """Over every interval in which the clock runs forward; a jump adds a full burst at most."""
    bucket, now, allowed = TokenBucket(), 1000.0, float(burst)
    through = 0
    for step in steps:
        now += step
        allowed = min(allowed + max(0.0, step) * rate, through + burst)
        if bucket.wait(now, rate, burst) == 0.0:
            assert bucket.take(now, rate, burst) == 0.0
            through += 1
        assert through <= allowed + 1e-6


QUOTAS = [
    Quota("plain"),
    Quota("timed", slo=0.01),
    Quota("hard", deadline=0.05),
    Quota("held", rate=20.0, burst=1, deadline=1.0),
    Quota("rated", rate=20.0, burst=2, excess="refuse"),
    Quota("bounded", max_pending=2),
]


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # every example has an engine of its own
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["submit", "submit", "submit", "cancel", "clock", "kick", "wait", "fault"]),
            st.integers(0, 5),
            st.floats(-0.1, 0.3),
        ),
        max_size=40,
    )
)
def test_accepted_is_the_sum_of_all_outcomes(lab: Any, steps: list[tuple[str, int, float]]) -> None:
    """Whatever happens, also when the clock jumps."""
    clock = Clock()
    engine, program, model = ready(lab, clock, max_bundle=3)

    def fail(inputs: list[torch.Tensor]) -> None:
        if (inputs[0] == 7.0).any():
            raise ValueError("seven")

    lab.plans["affine"].before = fail
    requests: list[Any] = []
    refused = 0
    try:
        for action, which, value in steps:
            if action in ("submit", "fault"):
                try:
                    number = 7.0 if action == "fault" else 1.0
                    requests.append(lab.submit(engine, program, model, number, QUOTAS[which]))
                except (Overloaded, RateExceeded, DeadlineUnattainable):
                    refused += 1
            elif action == "cancel" and requests:
                requests[which % len(requests)].cancel()
            elif action == "clock":
                clock.now += value
            elif action == "kick":
                engine.kick()
            elif action == "wait":
                engine.wait(
                    [one for one in requests if one.eligible <= clock.now and one.expires > clock.now]
                )
            check(engine, requests, refused)
    finally:
        engine.close()
    check(engine, requests, refused)
    assert all(request.done() for request in requests)


def check(engine: Any, requests: list[Any], refused: int) -> None:
    tenants = engine.stats().tenants.values()
    assert sum(got.accepted for got in tenants) == len(requests)
    assert sum(got.refused for got in tenants) == refused
    for got in tenants:
        ends = got.ok + got.late + got.expired + got.cancelled + got.errors
        assert got.accepted == ends + got.pending
        assert got.pending >= 0


def test_alarms_of_what_was_served_keep_nothing_alive(lab: Any) -> None:
    engine, program, model = ready(lab)
    quota = Quota("a", deadline=3600.0)
    gone = []
    for _ in range(500):
        request = lab.submit(engine, program, model, quota=quota)
        gone.append(weakref.ref(request.result()[0]))
    alarms = request.dispatcher._line.alarms
    del request
    gc.collect()
    assert sum(reference() is not None for reference in gone) == 0
    assert len(alarms) <= 64


def test_an_interrupted_request_with_a_deadline_goes_out_again(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, program, model = ready(lab)
    plan = lab.plans["affine"]
    (dispatcher,) = engine._dispatchers.values()
    # The service thread, which a deadline wakes, would serve them all before anybody is interrupted.
    monkeypatch.setattr(dispatcher.service, "poke", lambda: None)
    others = [lab.submit(engine, program, model, 5.0, Quota("a", deadline=30.0)) for _ in range(3)]

    def interrupt(inputs: list[torch.Tensor]) -> None:
        monkeypatch.undo()
        plan.before = lambda inputs: None
        raise KeyboardInterrupt

    plan.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        lab.call(engine, program, model)
    lab.until(lambda: all(other.done() for other in others))
    assert [other.result()[0][0].item() for other in others] == [10.0] * 3

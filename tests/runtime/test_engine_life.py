"""Waiting, compiling, threads, forks and memory."""

from __future__ import annotations

import gc
import os
import threading
import time
import tracemalloc
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_mux.errors import DispatchFailed, ExecutionFailed
from torch_mux.runtime import dispatch, stopping
from torch_mux.runtime.scheduler.policy import FairPolicy
from torch_mux.settings import Settings
from torch_mux.types import Quota


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def in_thread(function: Any) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    return thread, results


def test_max_wait_on_an_injected_clock(lab: Any) -> None:
    clock = Clock()
    engine, program, model = lab.engine(clock, max_wait=30.0), lab.program(), lab.Affine(2.0)
    engine.register(program)
    assert engine.quiesce(10)
    first, answer = in_thread(lambda: lab.call(engine, program, model, 1.0))
    lab.until(lambda: engine.stats().tenants.get("default"))
    second = lab.submit(engine, program, model, 2.0)
    time.sleep(0.05)
    assert not second.out
    assert lab.plans["affine"].bundles == []
    clock.now += 30.0
    engine.kick()
    first.join(10)
    assert answer[0][0].item() == 2.0
    assert second.result()[0][0].item() == 4.0
    assert lab.plans["affine"].bundles == [2]


def test_a_full_bundle_ends_the_wait(lab: Any) -> None:
    engine, program, model = lab.engine(max_wait=60.0, max_bundle=3), lab.program(), lab.Affine(2.0)
    engine.register(program)
    assert engine.quiesce(10)
    threads = [
        in_thread(lambda value=value: lab.call(engine, program, model, value)) for value in (1.0, 2.0, 3.0)
    ]
    for thread, _ in threads:
        thread.join(10)
    assert [answer[0][0].item() for _, answer in threads] == [2.0, 4.0, 6.0]
    assert lab.plans["affine"].bundles == [3]


def test_configure_changes_the_wait_of_what_is_pending(lab: Any) -> None:
    engine, program, model = lab.engine(max_wait=60.0), lab.program(), lab.Affine(2.0)
    engine.register(program)
    assert engine.quiesce(10)
    thread, answer = in_thread(lambda: lab.call(engine, program, model))
    lab.until(lambda: engine.stats().tenants.get("default"))
    engine.configure(Settings(max_wait=0.0))
    thread.join(10)
    assert answer[0][0].item() == 2.0


def test_max_bundle_splits(lab: Any) -> None:
    engine, program, model = lab.engine(max_bundle=3), lab.program(), lab.Affine()
    engine.wait([lab.submit(engine, program, model) for _ in range(8)])
    assert lab.plans["affine"].bundles == [3, 3, 2]


def test_a_slow_compile_blocks_only_its_own_callers(lab: Any) -> None:
    lab.slow["slow"] = threading.Event()
    engine, model = lab.engine(), lab.Affine(2.0)
    fast, slow = lab.program("fast"), lab.program("slow")
    engine.register(fast)
    assert engine.quiesce(10)
    first, answer = in_thread(lambda: lab.call(engine, slow, model, 3.0))
    lab.until(lambda: "default" in engine.stats().tenants)
    assert lab.call(engine, fast, model, 4.0)[0].item() == 8.0
    assert {report.name: report.status for report in engine.plans()} == {"fast": "ready", "slow": "compiling"}
    assert not answer
    lab.slow["slow"].set()
    first.join(10)
    assert answer[0][0].item() == 6.0


def test_futures_of_a_slow_compile_go_out_when_it_ends(lab: Any) -> None:
    lab.slow["slow"] = threading.Event()
    engine, program, model = lab.engine(), lab.program("slow"), lab.Affine(2.0)
    request = lab.submit(engine, program, model)
    engine.kick()
    lab.slow["slow"].set()
    lab.until(request.done)
    assert request.result()[0][0].item() == 2.0


def test_a_failed_compile_is_its_callers_error(lab: Any) -> None:
    lab.broken.add("broken")
    lab.slow["broken"] = threading.Event()
    engine, broken, good, model = lab.engine(), lab.program("broken"), lab.program(), lab.Affine(2.0)
    early = lab.submit(engine, broken, model)
    lab.slow["broken"].set()
    for request in (early, None):
        with pytest.raises(ExecutionFailed, match="ValueError: no code for broken") as caught:
            (request or lab.submit(engine, broken, model)).result()
        assert isinstance(caught.value.__cause__, ValueError)
    assert lab.call(engine, good, model)[0].item() == 2.0
    assert engine.plans()[0].status == "failed"
    assert engine.plans()[0].error == "ValueError: no code for broken"


def test_closing_fails_what_still_compiles(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0.0 < stopping._JOIN <= 5.0
    monkeypatch.setattr(stopping, "_JOIN", 0.2)
    lab.slow["slow"] = threading.Event()
    engine, program, model = lab.engine(), lab.program("slow"), lab.Affine()
    request = lab.submit(engine, program, model)
    closing, _ = in_thread(engine.close)
    closing.join(10)
    assert not closing.is_alive()
    assert "closed" in str(request.error)


class Faulty(FairPolicy):
    """A policy that raises once."""

    def __init__(self) -> None:
        super().__init__()
        self.fault: list[BaseException] = []

    def form(self, *args: Any) -> Any:
        if self.fault:
            raise self.fault.pop()
        return super().form(*args)


def test_a_dead_dispatcher_thread_is_an_error_and_never_a_hang(lab: Any) -> None:
    engine, program, model = lab.engine(), lab.program(), lab.Affine(2.0)
    lab.call(engine, program, model)
    dispatcher = lab.submit(engine, program, model).dispatcher
    policy = Faulty()
    dispatcher._driver.policy = policy
    request = lab.submit(engine, program, model)
    policy.fault = [SystemError("bug")]
    engine.kick()
    lab.until(request.done)
    with pytest.raises(DispatchFailed, match="SystemError: bug"):
        request.result()
    again = lab.submit(engine, program, model, 3.0)
    engine.kick()
    lab.until(again.done)
    assert again.result()[0][0].item() == 6.0


def test_an_interrupted_dispatcher_loses_nobody_elses_request(lab: Any) -> None:
    engine, program, model = lab.engine(), lab.program(), lab.Affine(2.0)
    lab.call(engine, program, model)
    plan = lab.plans["affine"]
    other = lab.submit(engine, program, model, 5.0)

    def interrupt(inputs: list[Tensor]) -> None:
        plan.before = lambda inputs: None
        raise KeyboardInterrupt

    plan.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        lab.call(engine, program, model)
    lab.until(other.done)
    assert other.result()[0][0].item() == 10.0


def test_a_holder_that_is_gone_is_noticed(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_LIVENESS", 0.05)
    engine, program, model = lab.engine(), lab.program(), lab.Affine(2.0)
    lab.call(engine, program, model)
    dispatcher = lab.submit(engine, program, model, 1.0).dispatcher
    gone = threading.Thread(target=lambda: None)
    gone.start()
    gone.join()
    dispatcher._holder = gone
    thread, answer = in_thread(lambda: lab.call(engine, program, model, 4.0))
    thread.join(10)
    assert answer[0][0].item() == 8.0


def test_many_threads_and_programs_all_get_their_own_answers(lab: Any) -> None:
    lab.alone.add("p1")
    engine = lab.engine(max_bundle=5)
    programs = [lab.program(f"p{number}") for number in range(3)]
    models = [lab.Affine(float(scale)) for scale in range(6)]
    wrong: list[Any] = []

    def client(number: int) -> None:
        for step in range(60):
            model, program = models[(number + step) % 6], programs[step % 3]
            value = float(number * 100 + step)
            if step % 4:
                got = lab.call(engine, program, model, value)
            else:
                request = lab.submit(engine, program, model, value)
                engine.kick()
                got = request.result()[0]
            if not torch.equal(got, value * model.weight):
                wrong.append((number, step))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong
    tenant = engine.stats().tenants["default"]
    assert (tenant.accepted, tenant.ok, tenant.pending) == (480, 480, 0)


def test_a_forked_child_starts_afresh(lab: Any) -> None:
    engine, program, model = lab.engine(), lab.program(), lab.Affine(2.0)
    instance = engine.instance(program, model.tensors())
    lab.call(engine, program, model)
    entered, gate = threading.Event(), threading.Event()

    def hold(inputs: list[Tensor]) -> None:
        entered.set()
        assert gate.wait(10)

    lab.plans["affine"].before = hold
    running = lab.submit(engine, program, model)
    engine.kick()
    assert entered.wait(10)
    pending = lab.submit(engine, program, model, 5.0)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        seen: Any = None
        try:
            stranded = (running.state.value, pending.state.value)
            answer = lab.call(engine, program, model, 3.0)[0].item()
            resolved = engine.submit(instance, [lab.x(4.0)], Quota()).result()[0][0].item()
            seen = (stranded, answer, resolved)
        finally:
            os.write(writer, repr(seen).encode())
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 1000).decode() == repr((("error", "error"), 6.0, 8.0))
    gate.set()
    assert running.result()[0][0].item() == 2.0
    assert pending.result()[0][0].item() == 10.0


def test_stats_per_tenant(lab: Any) -> None:
    engine, program, model = lab.engine(), lab.program(), lab.Affine()
    lab.call(engine, program, model)
    both = [lab.submit(engine, program, model, quota=Quota(name)) for name in ("alice", "bob")]
    engine.wait(both)
    engine.wait([lab.submit(engine, program, model, quota=Quota("alice"))])
    tenants = engine.stats().tenants
    alice, bob = tenants["alice"], tenants["bob"]
    assert (alice.accepted, alice.ok, alice.coalesced_share) == (2, 2, 0.5)
    assert (bob.ok, bob.coalesced_share) == (1, 1.0)
    assert alice.p50 is not None
    assert alice.p99 is not None
    assert 0.0 < alice.p50 <= alice.p99
    assert alice.device_seconds > bob.device_seconds > 0.0
    stats = engine.stats()
    assert (stats.bundles, stats.requests, stats.sizes) == (3, 4, {1: 2, 2: 1})
    assert stats.device_seconds == pytest.approx(sum(tenant.device_seconds for tenant in tenants.values()))


def grown(action: Any) -> int:
    """Bytes of Python memory that ``action`` leaves behind."""
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    action()
    gc.collect()
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return after - before


def test_ten_thousand_requests_leave_nothing_behind(lab: Any) -> None:
    engine, program = lab.engine(), lab.program()
    models = [lab.Affine(float(scale)) for scale in range(4)]

    def serve(rounds: int) -> None:
        for _ in range(rounds):
            engine.wait([lab.submit(engine, program, model) for model in models])

    serve(700)  # fills the latency window
    plan = lab.plans["affine"]
    plan.bundles, plan.controls, plan.threads = [], [], []

    class Nothing(list[Any]):
        def append(self, item: Any) -> None:
            pass

    plan.bundles, plan.controls, plan.threads = Nothing(), Nothing(), Nothing()
    objects = len(gc.get_objects())
    assert grown(lambda: serve(2500)) < 20_000
    assert len(gc.get_objects()) - objects < 200


def test_two_hundred_models_come_and_go(lab: Any) -> None:
    engine, program = lab.engine(), lab.program()

    def churn(times: int) -> None:
        for step in range(times):
            model = lab.Affine(float(step))
            assert lab.call(engine, program, model, 2.0)[0].item() == 2.0 * step
            del model
        lab.until(lambda: lab.plans["affine"].storage.bound == 0 and engine.plans()[0].instances == 0)

    churn(20)
    plan = lab.plans["affine"]
    objects = len(gc.get_objects())
    assert grown(lambda: churn(200)) < 60_000
    assert len(gc.get_objects()) - objects < 200 + 3 * len(plan.bundles)


def test_close_ends_the_threads(lab: Any) -> None:
    engine, program, model = lab.engine(), lab.program(), lab.Affine()
    request = lab.submit(engine, program, model)
    engine.kick()
    request.result()
    service = request.dispatcher.service._thread
    compiler = engine.compile_thread._thread
    assert service is not None
    assert compiler is not None
    engine.close()
    assert not service.is_alive()
    assert not compiler.is_alive()

"""Every fault has a point at which it is injected: it is the error of whom it concerns, and nobody hangs."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from faults import always, injected, once
from slow_device import slow

from torch_mux.errors import DeviceFailed, DispatchFailed, ExecutionFailed, MuxError, Quarantined
from torch_mux.runtime import dispatch, ring
from torch_mux.runtime.retirement import Retirement
from torch_mux.types import FallbackKind, Quota


class Clock:
    """Goes on by itself, and further when it is told to."""

    def __init__(self) -> None:
        self.skipped = 0.0

    def __call__(self) -> float:
        return time.perf_counter() + self.skipped


def served_by(lab: Any, engine: Any) -> tuple[Any, Any]:
    program = lab.program()
    engine.register(program)
    assert engine.quiesce(10)
    return program, engine._served[program.fingerprint]


def watch(device: Any, engine: Any, lab: Any, number: int, model: Any) -> None:
    """So many bundles of one, one after another, each to its end on the device."""
    for _ in range(number):
        request = lab.submit(engine, lab.program(), model, 3.0)
        assert request.result()[0][0].item() == 6.0
        lab.until(request.done)


def test_a_plan_that_turns_slow_is_retired_and_tried_again(lab: Any) -> None:
    clock = Clock()
    engine, device = slow(lab, clock=clock)
    program, served = served_by(lab, engine)
    model = lab.Affine(2.0)
    device.seconds = 0.001
    watch(device, engine, lab, 10, model)
    device.seconds_of = lambda bundle: 0.012 if bundle.coalesced else 0.001
    watch(device, engine, lab, 8, model)
    assert engine.quiesce(10)
    watch(device, engine, lab, 1, model)
    assert lab.plans["affine alone"].bundles == [1]
    report = engine.plans()[0]
    assert report.coalesced is False
    assert report.reasons[0].kind is FallbackKind.RETIRED and "usually 0.001 s" in report.reasons[0].detail
    assert report.changes == (report.reasons[0],)
    # Tenants go on, on the other plan, also several at once.
    requests = [lab.submit(engine, program, lab.Affine(4.0), 2.0, Quota(f"t{n}")) for n in range(5)]
    engine.wait(requests)
    assert [request.result()[0][0].item() for request in requests] == [8.0] * 5
    assert len(lab.plans["affine alone"].bundles) == 6
    # Tried again too early: two bundles are enough, and the pause is twice as long.
    clock.skipped += 11.0
    watch(device, engine, lab, 3, model)
    assert [change is None for change in engine.plans()[0].changes] == [False, True, False]
    clock.skipped += 11.0
    watch(device, engine, lab, 1, model)
    assert engine.plans()[0].coalesced is False
    # It has recovered.
    device.seconds_of = lambda bundle: 0.001
    clock.skipped += 11.0
    watch(device, engine, lab, 20, model)
    report = engine.plans()[0]
    assert report.coalesced is True and report.reasons == ()
    assert [change is None for change in report.changes] == [False, True, False, True]
    assert served.slots > 1


def test_a_device_that_is_slow_for_everybody_retires_nobody(lab: Any) -> None:
    engine, device = slow(lab)
    first, second = lab.program(), lab.program("other")
    engine.register(second)
    assert engine.quiesce(10)
    model = lab.Affine(2.0)
    for seconds, number in ((0.001, 10), (0.015, 12)):
        device.seconds = seconds
        for _ in range(number):
            requests = [lab.submit(engine, program, model) for program in (first, second)]
            engine.wait(requests)
            lab.until(lambda requests=requests: all(request.done() for request in requests))
    assert all(report.changes == () for report in engine.plans())


def test_zero_retires_nobody_and_one_slow_bundle_does_not() -> None:
    class Served(SimpleNamespace):
        __hash__ = object.__hash__

    wanted: list[Any] = []

    def served() -> Any:
        return Served(retired=None, detour=None, program=Served(name="p"), make_detour=wanted.append)

    retirement = Retirement(lambda served: None)
    for factor, slow_runs in ((0.0, 100), (8.0, 7)):
        retirement.factor = factor
        one = served()
        for turn in range(16):
            retirement.ran(one, 4, 1e-3, float(turn))
        for turn in range(slow_runs):
            retirement.ran(one, 4, 1.0, 16.0 + turn)
        retirement.ran(one, 4, 1e-3, 500.0)
        assert not wanted
    retirement.ran(one, 4, None, 501.0)  # nobody measured
    for turn in range(8):
        retirement.ran(one, 4, 1.0, 502.0 + turn)
    assert len(wanted) == 1
    assert str(wanted[0]) == f"p: {FallbackKind.RETIRED.value} (bundles of 4 take 1 s, usually 0.001 s)"


def test_a_plan_that_keeps_raising_is_retired(lab: Any) -> None:
    engine = lab.engine(quarantine=0)
    program, _ = served_by(lab, engine)
    model = lab.Affine(2.0)

    def fail(inputs: list[torch.Tensor]) -> None:
        raise ValueError("the plan is broken")

    lab.plans["affine"].before = fail
    for _ in range(8):
        with pytest.raises(ExecutionFailed, match="the plan is broken"):
            lab.call(engine, program, model)
    assert engine.quiesce(10)
    assert lab.call(engine, program, model, 3.0)[0].item() == 6.0
    assert "8 times in a row: ValueError" in engine.plans()[0].reasons[0].detail


def test_requests_that_raise_now_and_then_retire_nothing(lab: Any) -> None:
    engine = lab.engine(quarantine=0)
    program, _ = served_by(lab, engine)
    model = lab.Affine(2.0)

    def fail(inputs: list[torch.Tensor]) -> None:
        if (inputs[0] == 7.0).any():
            raise ValueError("seven")

    lab.plans["affine"].before = fail
    for _ in range(20):
        with pytest.raises(ExecutionFailed, match="seven"):
            lab.call(engine, program, model, 7.0)
        lab.call(engine, program, model)
    assert engine.plans()[0].changes == ()


def test_a_launch_that_fails_once_is_one_requests_error_at_most(lab: Any) -> None:
    engine = lab.engine()
    program, _ = served_by(lab, engine)
    model = lab.Affine(2.0)
    requests = [lab.submit(engine, program, model, 3.0, Quota(f"t{number}")) for number in range(4)]
    with injected(engine, "launch", once(RuntimeError("hiccup"))) as calls:
        engine.wait(requests)
    assert [request.result()[0][0].item() for request in requests] == [6.0] * 4
    assert len(calls) == 5  # all together, then each alone


def test_a_tenant_whose_requests_raise_again_and_again_is_held_off_alone(lab: Any) -> None:
    engine = lab.engine(quarantine=4)
    program, _ = served_by(lab, engine)
    model = lab.Affine(2.0)

    def fault(real: Any, bundle: Any) -> Any:
        if any(request.quota.tenant == "mallory" for request in bundle.requests):
            raise ValueError("bad request")
        return real(bundle)

    with injected(engine, "launch", fault):
        for _ in range(4):
            both = [lab.submit(engine, program, model, 3.0, Quota(name)) for name in ("mallory", "alice")]
            engine.wait(both)
            assert both[1].result()[0][0].item() == 6.0
            with pytest.raises(ExecutionFailed):
                both[0].result()
        with pytest.raises(Quarantined):
            lab.submit(engine, program, model, 3.0, Quota("mallory"))
        assert lab.submit(engine, program, model, 3.0, Quota("alice")).result()[0][0].item() == 6.0


def test_memory_that_stays_short_is_the_error_of_the_request_that_needs_it(lab: Any) -> None:
    engine = lab.engine()
    program, _ = served_by(lab, engine)
    model = lab.Affine(2.0)

    def fault(real: Any, bundle: Any) -> Any:
        if any(request.quota.tenant == "large" for request in bundle.requests):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(bundle)

    requests = [lab.submit(engine, program, model, 3.0, Quota(name)) for name in ("a", "large", "b")]
    with injected(engine, "launch", fault):
        engine.wait(requests)
    with pytest.raises(ExecutionFailed, match="out of memory"):
        requests[1].result()
    assert [requests[number].result()[0][0].item() for number in (0, 2)] == [6.0, 6.0]
    assert engine.plans()[0].changes == ()


@pytest.mark.parametrize("point", ["decide", "issued", "land"])
def test_a_dispatcher_that_dies_is_an_error_on_every_waiting_call_at_once(
    lab: Any, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_LIVENESS", 60.0)  # they are told, and do not have to look
    engine = lab.engine()
    program, _ = served_by(lab, engine)
    model = lab.Affine(2.0)
    lab.call(engine, program, model)
    ends: list[BaseException | None] = []

    def call(request: Any) -> None:
        error = None
        try:
            request.result()
        except BaseException as raised:
            error = raised
        ends.append(error)

    with injected(engine, point, always(SystemError("bug"))):
        requests = [lab.submit(engine, program, model) for _ in range(8)]
        threads = [threading.Thread(target=call, args=(one,), daemon=True) for one in requests]
        for thread in threads:
            thread.start()
        engine.kick()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive(), "a call hangs"
    for error in ends:
        assert error is None or isinstance(error, (SystemError, MuxError))
    assert point == "land" or any(isinstance(error, (SystemError, DispatchFailed)) for error in ends)
    assert lab.call(engine, program, model, 3.0)[0].item() == 6.0
    got = engine.stats().tenants["default"]
    assert got.pending == 0 and got.accepted == got.ok + got.errors


def test_a_holder_whose_thread_is_gone_is_noticed_within_a_second(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dispatch._LIVENESS <= 1.0
    monkeypatch.setattr(dispatch, "_LIVENESS", 0.05)
    engine = lab.engine()
    program, _ = served_by(lab, engine)
    model = lab.Affine(2.0)
    request = lab.submit(engine, program, model)
    dispatcher = request.dispatcher
    dead = threading.Thread(target=lambda: None)
    dead.start()
    dead.join()
    dispatcher._holder = dead
    assert lab.answers([request]) == [2.0]


def test_a_fault_that_stays_is_in_the_health_and_refuses_what_comes(lab: Any) -> None:
    engine, device = slow(lab)
    program, _ = served_by(lab, engine)
    model = lab.Affine(2.0)

    def poisoned(real: Any, bundle: Any) -> Any:
        device.fault = RuntimeError("CUDA error: an illegal memory access was encountered")
        raise device.fault

    with injected(engine, "launch", poisoned), pytest.raises(ExecutionFailed, match="illegal memory access"):
        lab.call(engine, program, model)
    (found,) = engine.health().devices
    assert found.fault is not None and "illegal memory access" in found.fault
    with pytest.raises(DeviceFailed):
        lab.call(engine, program, model)
    assert engine.stats().tenants["default"].pending == 0


def test_pinned_memory_that_runs_out_for_a_mark_queues_nothing(lab: Any) -> None:
    """Before anything is queued the call itself raises, and its memory and its place are given back."""
    engine = lab.engine()
    program, _ = served_by(lab, engine)
    model = lab.Affine(2.0)
    error = RuntimeError("CUDA error: out of memory (cudaHostAlloc)")
    with injected(engine, "mark", once(error)), pytest.raises(RuntimeError, match="cudaHostAlloc"):
        lab.submit(engine, program, model)
    got = engine.stats().tenants["default"]
    assert (got.pending, got.accepted) == (0, 0)
    assert lab.call(engine, program, model, 3.0)[0].item() == 6.0


@pytest.mark.gpu
def test_pinned_memory_that_runs_out_is_an_error_and_no_hang(lab: Any) -> None:
    """A lane that cannot have its pinned tables is not there; the others serve on."""
    engine = lab.gpu_engine()
    program = lab.program(device="cuda:0")
    engine.register(program)
    assert engine.quiesce(60)
    model = lab.Affine(2.0, "cuda:0")
    assert lab.call(engine, program, model, 3.0)[0].item() == 6.0
    error, reserved = RuntimeError("cudaHostAlloc: out of memory"), Quota("latent", reserve=0.25)
    with mock.patch.object(ring.torch, "zeros", side_effect=error):
        request = lab.submit(engine, program, model, 3.0, reserved)
        with pytest.raises(ExecutionFailed) as caught:
            request.result()
        assert caught.value.__cause__ is error
        assert lab.call(engine, program, model, 3.0)[0].item() == 6.0
    assert lab.submit(engine, program, model, 3.0, reserved).result()[0][0].item() == 6.0


@pytest.mark.gpu
def test_a_plan_retired_on_a_gpu_serves_on(lab: Any) -> None:
    engine = lab.gpu_engine(capture=False)
    program = lab.program(device="cuda:0")
    engine.register(program)
    assert engine.quiesce(60)
    model = lab.Affine(2.0, "cuda:0")

    def call() -> float:
        result: float = lab.call(engine, program, model, 3.0)[0].item()
        engine.stats()
        return result

    for _ in range(20):
        assert call() == 6.0
    lab.plans["affine"].before = lambda inputs: torch.cuda._sleep(100_000_000)
    for _ in range(12):
        assert call() == 6.0
    assert engine.quiesce(60)
    assert call() == 6.0
    assert engine.plans()[0].coalesced is False
    assert lab.plans["affine alone"].bundles


def test_a_join_that_fails_is_its_callers_error(lab: Any) -> None:
    """What the caller's stream cannot be made to wait for is no answer for him; nobody else notices."""
    engine = lab.engine()
    program, _ = served_by(lab, engine)
    model = lab.Affine(2.0)
    requests = [lab.submit(engine, program, model, 3.0, Quota(name)) for name in ("a", "b")]
    error = RuntimeError("CUDA error: invalid resource handle")
    with injected(engine, "join", once(error)):
        with pytest.raises(RuntimeError, match="invalid resource handle"):
            requests[0].result()
        assert requests[1].result()[0][0].item() == 6.0
    assert requests[0].result()[0][0].item() == 6.0, "the answer itself is there"
    tenants = engine.stats().tenants
    assert [(tenants[name].ok, tenants[name].pending) for name in ("a", "b")] == [(1, 0), (1, 0)]


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), RuntimeError("a job")])
def test_the_compile_thread_outlives_whatever_its_jobs_raise(lab: Any, error: BaseException) -> None:
    """Plans of other models come all the same: a thread that ended would leave their requests waiting."""
    engine = lab.engine()

    def job() -> None:
        raise error

    engine.compile_thread.submit(job)
    assert engine.quiesce(10)
    program, model = lab.program(), lab.Affine(2.0)
    request = lab.submit(engine, program, model, 3.0)
    engine.kick()
    lab.until(request.done, 5.0)
    assert request.result()[0][0].item() == 6.0


@pytest.mark.parametrize("error", [ValueError("no code"), SystemExit(3)])
def test_a_compiler_that_fails_is_an_error_for_its_model_only(lab: Any, error: BaseException) -> None:
    engine = lab.engine()
    program, _ = served_by(lab, engine)
    other, model = lab.program("other"), lab.Affine(2.0)
    with injected(engine, "compile", once(error)):
        lost = lab.submit(engine, other, model)
        with pytest.raises(ExecutionFailed):
            lost.result()
    assert lab.call(engine, program, model, 3.0)[0].item() == 6.0
    got = engine.stats().tenants["default"]
    assert (got.pending, got.errors) == (0, 1)

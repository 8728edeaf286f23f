"""Who submits without a pause helps to serve what he submits, and never waits for the device."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from clocks import Told
from slow_device import SlowDevice, slow

from torch_mux.runtime.interrupt import Interrupt

CPU = torch.device("cpu")


def _dispatcher(engine: Any) -> Any:
    return engine._dispatchers[CPU]


def test_answers_come_while_one_thread_submits_without_a_pause(lab: Any) -> None:
    engine, program, model = lab.engine(max_bundle=16), lab.program(), lab.Affine(2.0)
    engine.register(program)
    assert engine.quiesce(10)
    # An operation gives the interpreter away, and who has it keeps it for five milliseconds.
    lab.plans["affine"].before = lambda inputs: [time.sleep(0) for _ in range(30)]
    first = lab.submit(engine, program, model, 3.0)
    engine.kick()  # the service thread may have begun
    requests = [first]
    most = oldest = 0
    for _ in range(4000):
        requests.append(lab.submit(engine, program, model, 3.0))
        engine.kick()
        while oldest < len(requests) and requests[oldest].done():
            oldest += 1
        most = max(most, len(requests) - oldest)
    assert most < 400
    assert all(request.result()[0].tolist() == [6.0] * 4 for request in requests)
    assert engine.stats().tenants["default"].pending == 0


def test_who_submits_dispatches_when_nobody_else_does(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service thread never gets a turn, and yet no more is pending than two bundles."""
    engine, program, model = lab.engine(max_bundle=4), lab.program(), lab.Affine(2.0)
    engine.register(program)
    assert engine.quiesce(10)
    monkeypatch.setattr(_dispatcher(engine).service, "poke", lambda: None)
    requests = []
    for _ in range(100):
        requests.append(lab.submit(engine, program, model, 3.0))
        engine.kick()
        assert sum(not request.done() for request in requests) <= 8
    monkeypatch.undo()
    assert all(request.result()[0].tolist() == [6.0] * 4 for request in requests)
    assert max(lab.plans["affine"].bundles) == 4


def test_nobody_who_submits_waits_for_the_device(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[int] = []
    real = SlowDevice.await_end

    def await_end(device: SlowDevice, interrupt: Interrupt | None = None) -> None:
        waited.append(threading.get_ident())
        real(device, interrupt)

    monkeypatch.setattr(SlowDevice, "await_end", await_end)
    clock = Told()
    engine, device = slow(lab, clock, max_bundle=2)
    program, model = lab.program(), lab.Affine(2.0)
    requests = []
    for _ in range(200):
        requests.append(lab.submit(engine, program, model, 3.0))
        engine.kick()
    # No bundle has ended, and yet all of this came to its end.
    assert threading.get_ident() not in waited
    assert device.highest <= 2
    lab.until(lambda: len(device.lanes[0]) == 2)
    out = sum(request.out for request in requests)
    assert out <= 4 and [request.cancel() for request in requests].count(True) == 200 - out
    clock.now += 1.0
    for request in requests:
        lab.until(request.done)


def test_who_finds_the_dispatcher_busy_goes_on_after_a_moment(lab: Any) -> None:
    """Another thread holds the role and computes: a submission takes a moment longer, and no more."""
    engine, program, model = lab.engine(max_bundle=2), lab.program(), lab.Affine(2.0)
    engine.register(program)
    assert engine.quiesce(10)
    lab.call(engine, program, model)
    gate, entered = threading.Event(), threading.Event()

    def block(inputs: object) -> None:
        entered.set()
        assert gate.wait(20)

    lab.plans["affine"].before = block
    first = lab.submit(engine, program, model, 3.0)
    engine.kick()
    assert entered.wait(10)
    started = time.perf_counter()
    requests = [first]
    for _ in range(50):
        requests.append(lab.submit(engine, program, model, 3.0))
        engine.kick()
    assert time.perf_counter() - started < 5
    gate.set()
    assert all(request.result()[0].tolist() == [6.0] * 4 for request in requests)


def test_a_flood_behind_a_broken_policy_fails_and_does_not_hang(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, program, model = lab.engine(max_bundle=2), lab.program(), lab.Affine(2.0)
    engine.register(program)
    assert engine.quiesce(10)
    dispatcher = _dispatcher(engine)
    monkeypatch.setattr(dispatcher.service, "poke", lambda: None)

    def broken(*arguments: object) -> None:
        raise ValueError("no decision")

    with monkeypatch.context() as patch:
        patch.setattr(dispatcher.policy, "form", broken)
        requests = [lab.submit(engine, program, model, 3.0) for _ in range(5)]
        engine.kick()  # raises nothing: the requests have the error
    assert all(request.done() for request in requests)
    with pytest.raises(Exception, match="no decision"):
        requests[0].result()
    assert lab.call(engine, program, model, 3.0).tolist() == [6.0] * 4

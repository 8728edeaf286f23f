"""Dispatching to a (simulated) device that goes on after the host: bounds, ends, lifetimes, cohorts."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import pytest
from clocks import Punctual, Told
from slow_device import slow

from torch_mux.errors import ExecutionFailed


def test_a_call_returns_before_the_device_has_finished(lab: Any) -> None:
    engine, _ = slow(lab, Told())  # it never finishes
    request = lab.submit(engine, lab.program(), lab.Affine(2.0), 3.0)
    assert lab.answers([request]) == [6.0]
    assert request.out
    assert not request.done()
    assert request.state.value == "running"
    assert len(request.inputs) == 1


def test_ends_are_seen_without_further_calls(lab: Any) -> None:
    engine, _ = slow(lab)
    program, model = lab.program(), lab.Affine()
    request = lab.submit(engine, program, model)
    engine.wait([request])
    lab.until(request.done)
    lab.until(lambda: request.inputs == ())  # let go of a moment later
    assert engine.stats().device_seconds == pytest.approx(0.02)
    late, early = threading.Event(), threading.Event()
    request = lab.submit(engine, program, model)
    request.add_done_callback(lambda ended: early.set())
    engine.wait([request])
    request.add_done_callback(lambda ended: late.set())
    assert early.wait(10)
    assert late.wait(10)


def test_a_bundle_goes_out_before_the_ends_of_the_former_are_counted(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, device = slow(lab)
    device.seconds = 0.001
    program, model = lab.program(), lab.Affine()
    engine.wait([lab.submit(engine, program, model)])
    (dispatcher,) = engine._dispatchers.values()
    monkeypatch.setattr(dispatcher.service, "poke", lambda: None)
    monkeypatch.setattr(dispatcher.service, "watch", lambda at_once: None)
    time.sleep(0.05)
    steps: list[str] = []
    for name in ("launch", "reap"):
        original = getattr(device, name)
        monkeypatch.setattr(
            device, name, lambda *a, name=name, original=original: (steps.append(name), original(*a))[1]
        )
    request = lab.submit(engine, program, model)
    engine.wait([request])
    assert steps[:2] == ["launch", "reap"]
    time.sleep(0.01)
    assert engine.stats().bundles == 2


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_policy_is_told_of_a_bundle_while_the_device_works_and_before_it_is_asked_again(
    lab: Any, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    """On a device where a launch lasts as long as the bundle, before that."""
    engine, device = slow(lab, Told(), max_bundle=1, in_flight=3)
    device.asynchronous = asynchronous
    steps: list[str] = []
    program, models = lab.program(), [lab.Affine() for _ in range(3)]
    requests = [lab.submit(engine, program, model) for model in models]
    (dispatcher,) = engine._dispatchers.values()
    for owner, name in ((dispatcher.policy, "form"), (dispatcher.policy, "issued"), (device, "launch")):
        original = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *a, name=name, original=original: (steps.append(name), original(*a))[1]
        )
    engine.wait(requests)
    once = ["form", "launch", "issued"] if asynchronous else ["form", "issued", "launch"]
    assert steps[:9] == once * 3
    assert lab.answers(requests) == [1.0, 1.0, 1.0]


def test_a_launch_that_raises_is_told_of_before_it_is_over(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, device = slow(lab, Told())
    program, model = lab.program(), lab.Affine()
    request = lab.submit(engine, program, model)
    (dispatcher,) = engine._dispatchers.values()
    steps: list[tuple[str, object]] = []
    for name in ("issued", "completed"):
        original = getattr(dispatcher.policy, name)
        monkeypatch.setattr(
            dispatcher.policy,
            name,
            lambda issue, *a, name=name, original=original: (
                steps.append((name, issue)),
                original(issue, *a),
            )[1],
        )

    def fail(bundle: Any) -> None:
        raise RuntimeError("no launch")

    monkeypatch.setattr(device, "launch", fail)
    with pytest.raises(ExecutionFailed, match="no launch"):
        request.result()
    assert [name for name, _ in steps] == ["issued", "completed"]
    assert steps[0][1] is steps[1][1]


def test_kicked_requests_run_to_their_end(lab: Any) -> None:
    engine, device = slow(lab, max_bundle=2)
    device.seconds = 0.005
    program, model = lab.program(), lab.Affine(2.0)
    requests = [lab.submit(engine, program, model, float(number)) for number in range(9)]
    engine.kick()
    lab.until(lambda: all(request.done() for request in requests))
    assert [request.result()[0][0].item() for request in requests] == [2.0 * n for n in range(9)]


@pytest.mark.parametrize("lanes", [1, 3])
def test_no_more_than_in_flight_bundles_a_lane(lab: Any, lanes: int) -> None:
    engine, device = slow(lab, max_bundle=1, in_flight=2, lanes=lanes)
    device.seconds = 0.005
    program, model = lab.program(), lab.Affine(2.0)
    requests = [lab.submit(engine, program, model, float(number)) for number in range(12)]
    engine.wait(requests)
    assert device.highest == 2
    assert [request.result()[0][0].item() for request in requests] == [2.0 * n for n in range(12)]


def test_a_row_is_kept_until_the_device_has_finished(lab: Any) -> None:
    clock = Told()
    engine, _ = slow(lab, clock)
    model = lab.Affine(2.0)
    request = lab.submit(engine, lab.program(), model)
    engine.wait([request])
    del model
    storage = lab.plans["affine"].storage
    time.sleep(0.05)
    assert storage.bound == 1
    clock.now += 1.0
    lab.until(lambda: storage.bound == 0)
    assert request.done()


def test_blocking_clients_form_cohorts_behind_a_busy_device(lab: Any) -> None:
    clock = Punctual()
    engine, device = slow(lab, clock, linger=0.02)
    device.seconds = 0.005
    program, models = lab.program(), [lab.Affine(float(scale)) for scale in range(4)]
    device.on_end = lambda flight: clock.leaves(len(flight.bundle.requests))
    start = threading.Barrier(4)

    def client(index: int) -> None:
        start.wait()
        for turn in range(10):
            ended = threading.Event()
            request = lab.submit(engine, program, models[index], 2.0)
            request.add_done_callback(lambda _, ended=ended: ended.set())
            if turn:
                clock.returns()
            assert request.result()[0][0].item() == 2.0 * index
            assert ended.wait(20)
        clock.returns()

    threads = [threading.Thread(target=client, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    sizes = engine.stats().sizes
    assert sum(size * number for size, number in sizes.items()) == 40
    assert sizes.get(4, 0) >= 6


def test_a_fault_of_the_device_is_the_bundles_error(lab: Any) -> None:
    engine, device = slow(lab)
    program, model = lab.program(), lab.Affine(2.0)
    request = lab.submit(engine, program, model)
    device.faults.append(RuntimeError("illegal address"))
    engine.wait([request])
    lab.until(request.done)
    with pytest.raises(ExecutionFailed, match="illegal address"):
        request.result()
    assert lab.call(engine, program, model, 3.0)[0].item() == 6.0


def test_closing_waits_for_the_device(lab: Any) -> None:
    engine, device = slow(lab)
    device.seconds = 0.1
    request = lab.submit(engine, lab.program(), lab.Affine())
    engine.wait([request])
    engine.close()
    assert request.done()
    assert not device.flying()


def test_a_hold_does_not_delay_who_waits_for_the_device(lab: Any) -> None:
    """While one program's request is held for companions, the end of another's bundle is told at once."""
    engine, device = slow(lab, max_wait=0.0, linger=0.0)
    first, second, model = lab.program(), lab.program("other"), lab.Affine(2.0)
    for program in (first, second):
        engine.register(program)
    engine.quiesce(10)
    device.seconds = 0.02
    told = threading.Event()
    request = lab.submit(engine, first, model)
    request.add_done_callback(lambda _: told.set())
    engine.wait([request])
    engine.configure(replace(engine.settings, max_wait=60.0))
    held = lab.submit(engine, second, model)
    thread = threading.Thread(target=held.result)
    thread.start()
    assert told.wait(10) and not held.out
    engine.configure(replace(engine.settings, max_wait=0.0))
    thread.join(10)
    assert not thread.is_alive()

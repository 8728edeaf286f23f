"""A tenant with a reserve beside others: on its own lane, at once, and what it is charged."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import pytest
from clocks import Told
from slow_device import slow

from torch_mux.runtime.interrupt import Interrupt
from torch_mux.runtime.timeline import Timeline, recorders
from torch_mux.types import Quota

LATENT = Quota("latent", reserve=0.25)


def flood(lab: Any, engine: Any, count: int) -> threading.Thread:
    """Somebody waits for more bundles of the common lane than may be enqueued, and dispatches meanwhile."""
    program, model = lab.program(), lab.Affine(2.0)
    requests = [lab.submit(engine, program, model, quota=Quota("others")) for _ in range(count)]
    thread = threading.Thread(target=engine.wait, args=(requests,))
    thread.start()
    return thread


def alone(lab: Any, engine: Any, device: Any, clock: Told, model: Any) -> None:
    """A first request of the tenant with a reserve, to its end."""
    lab.submit(engine, lab.program(), model, quota=LATENT).result()
    clock.runs_until(lambda: not device.flying(), 0.1)


def test_it_goes_out_at_once_while_the_common_lane_is_full(lab: Any) -> None:
    clock = Told()
    engine, device = slow(lab, clock, max_bundle=1, in_flight=2)
    device.seconds = 0.4
    model = lab.Affine(3.0)
    alone(lab, engine, device, clock, model)
    thread = flood(lab, engine, 5)
    lab.until(lambda: len(device.lanes[0]) == 2)
    # No time passes: no bundle ends before it is out.
    request = lab.submit(engine, lab.program(), model, 2.0, quota=LATENT)
    assert lab.answers([request]) == [6.0]
    assert request.flight.bundle.lane == 1
    assert len(device.lanes[0]) == 2
    clock.runs_until(lambda: not thread.is_alive(), 0.1)


def test_a_kicked_one_goes_out_while_the_end_of_what_is_under_way_is_waited_for(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Told()
    engine, device = slow(lab, clock)
    program, model = lab.program(), lab.Affine(3.0)
    alone(lab, engine, device, clock, model)
    waits, await_end = threading.Event(), device.await_end

    def waiting(interrupt: Interrupt | None = None) -> None:
        waits.set()
        await_end(interrupt)

    monkeypatch.setattr(device, "await_end", waiting)
    other = lab.submit(engine, program, model, quota=Quota("others"))
    other.add_done_callback(lambda _: None)  # somebody wants to be told, so its end is waited for
    engine.kick()
    assert waits.wait(10)
    request = lab.submit(engine, program, model, 2.0, quota=LATENT)
    engine.kick()
    lab.until(lambda: request.out)  # no time passes: nothing ends before
    assert request.flight.bundle.lane == 1 and device.lanes[0]


def test_neither_a_kicked_one_waits_and_its_end_is_told_in_time(lab: Any) -> None:
    clock = Told()
    engine, device = slow(lab, clock, max_bundle=1, in_flight=2)
    program, model = lab.program(), lab.Affine(3.0)
    alone(lab, engine, device, clock, model)
    device.seconds = 0.5
    requests = [lab.submit(engine, program, model, quota=Quota("others")) for _ in range(5)]
    engine.kick()
    lab.until(lambda: len(device.lanes[0]) == 2)
    device.seconds = 0.05
    told = threading.Event()
    request = lab.submit(engine, program, model, quota=LATENT)
    request.add_done_callback(lambda _: told.set())
    engine.kick()
    lab.until(lambda: request.out)
    assert not told.is_set()
    clock.now += 0.051
    assert told.wait(10)
    assert len(device.lanes[0]) == 2
    clock.runs_until(lambda: all(other.out for other in requests), 0.1)


def test_the_others_are_capped_beside_it_and_only_then(lab: Any) -> None:
    clock = Told()
    engine, _ = slow(lab, clock)
    program, model = lab.program(), lab.Affine()
    with recorders.record(Timeline()) as timeline:
        for quota in (Quota("others"), LATENT, Quota("others")):
            lab.submit(engine, program, model, quota=quota).result()
            clock.now += 1e-3
        clock.runs_until(lambda: len(timeline.spans) == 3, 0.02)
    spans = sorted(timeline.spans, key=lambda span: span.issued)
    assert [(span.lane, span.reserved, span.share) for span in spans] == [
        (0, False, 1.0),
        (1, True, 0.25),
        (0, False, 0.75),
    ]


def test_tenants_together_are_charged_the_time_in_which_the_device_was_busy(lab: Any) -> None:
    clock = Told()
    engine, device = slow(lab, clock)
    device.seconds = 0.2
    program, model = lab.program(), lab.Affine()
    engine.wait([lab.submit(engine, program, model, quota=Quota("others"))])
    clock.now += 0.05
    engine.wait([lab.submit(engine, program, model, quota=LATENT)])
    clock.now += 0.25
    lab.until(lambda: engine.stats().bundles == 2)
    stats = engine.stats()
    charged = [stats.tenants[name].device_seconds for name in ("others", "latent")]
    assert sum(charged) == pytest.approx(stats.device_seconds)
    assert stats.device_seconds == pytest.approx(0.25)
    # One had the whole device, for as long as it did not know of the other, who may use a quarter.
    assert charged == [pytest.approx(0.05 + 0.15 * 0.8), pytest.approx(0.15 * 0.2 + 0.05)]


def test_isolation_can_be_turned_off_and_on_with_requests_pending(lab: Any) -> None:
    engine, device = slow(lab, max_bundle=4, in_flight=1)
    device.seconds = 0.01
    program, model = lab.program(), lab.Affine(2.0)
    for isolation in ("off", "caps", "priority", "off"):
        thread = flood(lab, engine, 5)
        requests = [lab.submit(engine, program, model, float(n), quota=LATENT) for n in range(6)]
        engine.configure(replace(engine.settings, isolation=isolation))
        requests += [lab.submit(engine, program, model, float(n), quota=LATENT) for n in range(6)]
        assert [r.result()[0][0].item() for r in requests] == [2.0 * n for n in range(6)] * 2
        thread.join(10)
    lab.until(lambda: not device.flying())
    lab.until(lambda: engine.stats().tenants["latent"].pending == 0)
    assert engine.stats().tenants["latent"].ok == 48


def test_calls_that_depend_on_each_other_keep_their_order(lab: Any) -> None:
    """A program that writes its buffers stays on the first lane, reserve or not."""
    engine, _ = slow(lab, max_bundle=1)
    program, model = lab.program("mutating", mutates=True), lab.Affine()
    engine.register(program)
    assert engine.quiesce(10)
    quotas = [Quota("default"), LATENT, Quota("default"), LATENT]
    order: list[str] = []
    lab.plans["mutating"].before = lambda inputs: order.append(f"t{int(inputs[0].flatten()[0])}")
    with recorders.record(Timeline()) as timeline:
        requests = [
            lab.submit(engine, program, model, float(number), quota) for number, quota in enumerate(quotas)
        ]
        engine.wait(requests)
        lab.until(lambda: len(timeline.spans) == len(quotas))
    assert order == ["t0", "t1", "t2", "t3"]
    assert {span.lane for span in timeline.spans} == {0}


def test_a_cpu_records_the_lane(lab: Any) -> None:
    engine = lab.engine()
    program, model = lab.program(), lab.Affine(2.0)
    with recorders.record(Timeline()) as timeline:
        for quota in (LATENT, Quota("others"), LATENT):
            assert lab.submit(engine, program, model, 3.0, quota=quota).result()[0][0].item() == 6.0
    assert [span.lane for span in timeline.spans] == [1, 0, 1]


def test_what_was_sent_off_before_isolation_changed_is_served(lab: Any) -> None:
    """Nobody waits for it, its plan is not there yet, and it moves to another queue meanwhile."""
    lab.slow["late"] = threading.Event()
    engine, model = lab.engine(), lab.Affine(2.0)
    program = lab.program("late")
    engine.register(program)
    requests = [lab.submit(engine, program, model, float(n), quota=LATENT) for n in range(3)]
    engine.kick()
    engine.configure(replace(engine.settings, isolation="off"))
    lab.slow["late"].set()
    lab.until(lambda: all(request.done() for request in requests))
    assert [request.result()[0][0].item() for request in requests] == [0.0, 2.0, 4.0]


def test_what_runs_again_alone_keeps_the_cap_of_its_bundle(lab: Any) -> None:
    clock = Told()
    engine, _ = slow(lab, clock)
    program, model = lab.program(), lab.Affine(2.0)

    def broken(inputs: list[Any]) -> None:
        if len(inputs[0]) > 1:
            raise ValueError("not two at once")

    lab.plans["affine"].before = broken
    with recorders.record(Timeline()) as timeline:
        lab.submit(engine, program, model, quota=LATENT).result()
        others = [lab.submit(engine, program, model, quota=Quota("others", sms=0.9)) for _ in range(2)]
        assert [request.result()[0][0].item() for request in others] == [2.0, 2.0]
        clock.runs_until(lambda: len(timeline.spans) == 3, 0.02)
    assert [span.share for span in timeline.spans if not span.reserved] == [0.75, 0.75]


def test_a_reserve_that_comes_and_goes_under_load_loses_nothing(lab: Any) -> None:
    """Requests of one tenant are pending in both queues, kicked or waited for; isolation changes too."""
    engine, program = lab.engine(max_bundle=4), lab.program()
    models = [lab.Affine(float(scale)) for scale in range(1, 4)]
    kinds = [Quota("fickle"), Quota("fickle", reserve=0.3), Quota("fickle", reserve=0.1), Quota("other")]
    wrong: list[object] = []
    done = threading.Event()
    served = [0, 0, 0]

    def client(number: int) -> None:
        turn = number
        while not done.is_set():
            requests = []
            for _ in range(8):
                turn += 1
                requests.append(lab.submit(engine, program, models[number], 2.0, quota=kinds[turn % 4]))
                if turn % 5 == 0:
                    engine.kick()
            try:
                wrong.extend(one for one in requests if one.result()[0][0].item() != 2.0 * (number + 1))
            except Exception as error:
                wrong.append(error)
            served[number] += len(requests)

    threads = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(20):
        time.sleep(0.05)
        engine.configure(replace(engine.settings, isolation=("off", "caps", "priority")[turn % 3]))
    done.set()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads) and not wrong
    tenants = engine.stats().tenants
    assert sum(got.ok for got in tenants.values()) == sum(served) > 100
    assert all(got.pending == 0 for got in tenants.values())

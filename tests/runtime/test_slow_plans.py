"""A plan is slow only beside bundles that ran in the same way: the same graphs, the same cap, undisturbed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
from simulated_gpu import SimulatedGpu, Timing, simulated_engine
from slow_device import slow

from torch_mux.runtime.engine import Engine
from torch_mux.runtime.retirement import Retirement
from torch_mux.types import Quota


class Served(SimpleNamespace):
    __hash__ = object.__hash__


def watched(factor: float = 8.0) -> tuple[Retirement, Any, list[Any]]:
    wanted: list[Any] = []
    retirement = Retirement(lambda served: None)
    retirement.factor = factor
    return (
        retirement,
        Served(retired=None, detour=None, program=Served(name="p"), make_detour=wanted.append),
        wanted,
    )


def test_a_bundle_is_compared_with_those_that_ran_in_the_same_way() -> None:
    retirement, one, wanted = watched()
    for turn in range(16):
        retirement.ran(one, 4, 1e-3, float(turn), "graph")
    for turn in range(16):
        retirement.ran(one, 4, 20e-3, 20.0 + turn, "launches")
    assert not wanted
    # And those of one way between tell nothing of the other.
    for turn in range(8):
        assert not wanted
        retirement.ran(one, 4, 20e-3, 40.0 + turn, "graph")
        retirement.ran(one, 4, 20e-3, 40.0 + turn, "never seen before")
    assert len(wanted) == 1 and "bundles of 4 take 0.02 s, usually 0.001 s" in str(wanted[0])


def test_what_something_else_delayed_is_neither_slow_nor_well() -> None:
    retirement, one, wanted = watched()
    for turn in range(16):
        retirement.ran(one, 4, 1e-3, float(turn))
    for turn in range(7):
        retirement.ran(one, 4, 20e-3, 20.0 + turn)
    for turn in range(20):
        retirement.ran(one, 4, 50e-3, 30.0 + turn, delayed=True)
    assert not wanted
    retirement.ran(one, 4, 20e-3, 60.0)
    assert len(wanted) == 1


def test_what_was_delayed_tells_how_long_a_bundle_takes_at_most() -> None:
    retirement, one, wanted = watched()
    for turn in range(16):
        retirement.ran(one, 4, 1e-3, float(turn), delayed=True)
    for turn in range(8):
        retirement.ran(one, 4, 20e-3, 20.0 + turn)
    assert len(wanted) == 1


def test_the_ways_of_a_plan_are_no_more_than_so_many() -> None:
    retirement, one, _ = watched()
    for turn in range(5000):
        retirement.ran(one, 4, 1e-3, float(turn), turn)
    assert len(retirement._watches[one].sizes) <= 1024


def test_a_smaller_cap_is_not_a_slow_plan_and_a_slow_plan_is_slow_within_it(lab: Any) -> None:
    engine, device = slow(lab)
    program = lab.program()
    served, model = engine._served[program.fingerprint], lab.Affine(2.0)
    seconds = [0.5e-3]
    device.seconds_of = lambda bundle: seconds[0] / bundle.limit

    def run(number: int, sms: float) -> None:
        for _ in range(number):
            request = lab.submit(engine, program, model, 3.0, Quota(f"t{sms}", sms=sms))
            engine.wait([request])
            lab.until(request.done)

    run(12, 1.0)
    run(12, 0.05)
    assert engine.quiesce(10) and served.detour is None
    seconds[0] = 8e-3
    run(8, 0.05)
    assert engine.quiesce(10) and served.detour is not None


@pytest.fixture
def gpu(lab: Any) -> Iterator[Callable[..., tuple[Engine, SimulatedGpu, Callable[[int], None]]]]:
    """A simulated GPU that has served one program from its graph."""
    with ExitStack() as left:

        def make(timing: Timing) -> tuple[Engine, SimulatedGpu, Callable[[int], None]]:
            engine, made = left.enter_context(simulated_engine(timing))
            model, program = lab.Affine(2.0), lab.program()

            def go(number: int) -> None:
                instance = engine.instance(program, model.tensors())
                for _ in range(number):
                    (request,) = engine.submit_all([(instance, [lab.x()], Quota("t"))])
                    engine.kick()
                    lab.until(request.done, 10.0)

            go(1)
            assert engine.quiesce(20)
            go(12)
            return engine, made[0], go

        yield make


def detour(engine: Engine) -> object:
    """The plan that is made for a program whose own turned slow."""
    assert engine.quiesce(20)
    (served,) = engine._served.values()
    return served.detour


@pytest.mark.parametrize("captures", [False, True])
def test_launches_one_by_one_are_not_a_slow_plan(gpu: Any, captures: bool) -> None:
    """They take as long as the host, or longer beside a capture: on a new lane, or with other tables."""
    seconds = [300e-6]
    engine, device, go = gpu(Timing(lambda name, slots: seconds[0], launches=6e-3, capture=5e-3))
    (served,) = engine._served.values()
    stop = threading.Event()
    if captures:
        engine.compile_thread.submit(lambda: stop.wait(10))
    else:
        device.capturer.want = lambda *args, **named: None
    served.storage.generation += 1
    go(12)
    stop.set()
    assert detour(engine) is None
    if not captures:
        del device.capturer.want
    go(12)
    assert engine.quiesce(20)
    go(12)
    seconds[0] = 10e-3
    go(7)
    assert detour(engine) is None
    go(1)
    assert detour(engine) is not None


def test_what_is_compiled_meanwhile_may_use_the_device(gpu: Any) -> None:
    seconds = [300e-6]
    engine, _, go = gpu(Timing(lambda name, slots: seconds[0]))
    stop = threading.Event()
    engine.compile_thread.submit(lambda: stop.wait(10))
    time.sleep(0.05)
    seconds[0] = 10e-3
    go(12)
    stop.set()
    assert detour(engine) is None
    go(8)
    assert detour(engine) is not None


def test_a_row_that_is_written_within_a_bundle_is_not_its_plans_time(
    gpu: Any, lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prepared copies of a model that is new are made between the start and the end of its first bundle."""
    engine, device, _ = gpu(Timing())
    flights: list[Any] = []
    launch = device.launch
    monkeypatch.setattr(device, "launch", lambda bundle: flights.append(launch(bundle)) or flights[-1])
    models = [lab.Affine(float(number)) for number in range(3)]
    for model in models:
        instance = engine.instance(lab.program(), model.tensors())
        for _ in range(2):
            (request,) = engine.submit_all([(instance, [lab.x()], Quota("t"))])
            engine.kick()
            lab.until(request.done, 10.0)
    assert [flight.way is None for flight in flights] == [True, False] * 3

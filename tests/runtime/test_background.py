"""What is made off the request path leaves the interpreter to those who serve."""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from clocks import Told
from simulated_gpu import SimulatedGpu, Timing, burn, simulated_engine

from torch_mux import compat
from torch_mux.runtime.compile_thread import CompileThread, Rank
from torch_mux.runtime.engine import Engine
from torch_mux.types import Quota

PYTHONS = 0.005


@pytest.fixture(autouse=True)
def _interval() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(PYTHONS)
    yield
    left = sys.getswitchinterval()
    sys.setswitchinterval(before)
    assert left == pytest.approx(PYTHONS)


def test_the_interval_is_what_it_was_when_all_have_left() -> None:
    with compat.quick_switching(1e-3):
        assert sys.getswitchinterval() == pytest.approx(1e-3)
        with pytest.raises(ValueError, match="inside"), compat.quick_switching(1e-4):
            raise ValueError("inside")
        assert sys.getswitchinterval() == pytest.approx(1e-3)
    assert sys.getswitchinterval() == pytest.approx(PYTHONS)
    with compat.quick_switching(0.0):
        assert sys.getswitchinterval() == pytest.approx(PYTHONS)
    with compat.quick_switching(1.0):
        assert sys.getswitchinterval() == pytest.approx(PYTHONS)


def test_who_leaves_first_does_not_decide() -> None:
    other, mine = compat.quick_switching(1e-3), compat.quick_switching(1e-4)
    for first, second in ((other, mine), (compat.quick_switching(1e-4), compat.quick_switching(1e-3))):
        with contextlib.ExitStack() as stack:
            first.__enter__()
            stack.enter_context(second)
            assert sys.getswitchinterval() == pytest.approx(1e-4)
            first.__exit__(None, None, None)
            assert sys.getswitchinterval() == pytest.approx(1e-4 if second is mine else 1e-3)
        assert sys.getswitchinterval() == pytest.approx(PYTHONS)


def test_an_interval_that_somebody_sets_meanwhile_stays() -> None:
    with compat.quick_switching(1e-3):
        sys.setswitchinterval(2e-3)
    assert sys.getswitchinterval() == pytest.approx(2e-3)
    sys.setswitchinterval(PYTHONS)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_has_the_interval_of_before() -> None:
    with compat.quick_switching(1e-3):
        child = os.fork()
        if not child:
            os._exit(0 if abs(sys.getswitchinterval() - PYTHONS) < 1e-4 else 1)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_the_interval_is_short_while_a_job_runs_only() -> None:
    thread, seen = CompileThread(interval=lambda: 2e-4), []
    thread.submit(lambda: seen.append(sys.getswitchinterval()))
    assert thread.quiesce(10)
    assert seen == [pytest.approx(2e-4)]
    thread.close(10)


@pytest.mark.parametrize("rank", [Rank.SPARE, Rank.AHEAD])
def test_what_nobody_needs_now_takes_a_part_of_the_time_unless_somebody_waits(lab: Any, rank: Rank) -> None:
    clock, begun = Told(), []
    thread = CompileThread(quiet=0.0, serves=lambda: True, clock=clock)

    def job() -> None:
        begun.append(clock.now)
        clock.now += 0.05

    def asked() -> None:
        """Something that a request needs comes in between, and the thread thinks again."""
        done = threading.Event()
        thread.submit(done.set)
        assert done.wait(10)

    thread.submit(job, rank)
    lab.until(lambda: thread.finished == 1)
    thread.submit(job, rank)
    for step in (0.1, 0.2, 0.149):
        clock.now += step
        asked()
        time.sleep(0.02)
        assert len(begun) == 1
    clock.now += 0.002
    asked()
    lab.until(lambda: len(begun) == 2)
    thread.submit(job, rank)
    assert thread.quiesce(10, rank) and len(begun) == 3
    assert begun[2] - begun[1] == pytest.approx(0.05), "somebody waited for it"
    thread.close(10)


def test_what_nobody_asked_for_goes_on_while_nobody_is_served(lab: Any) -> None:
    clock, begun = Told(), []
    thread = CompileThread(quiet=0.0, clock=clock)

    def job() -> None:
        begun.append(clock.now)
        clock.now += 0.05

    for _ in range(3):
        thread.submit(job, Rank.AHEAD)
    lab.until(lambda: thread.finished == 3)
    assert begun == pytest.approx([100.0, 100.05, 100.1])
    thread.close(10)


@pytest.fixture
def gpu(lab: Any) -> Iterator[Callable[..., tuple[Engine, SimulatedGpu, Any]]]:
    """A simulated GPU that serves one program, with sizes captured."""
    left: list[Any] = []

    def make(timing: Timing, *sizes: int, **settings: Any) -> tuple[Engine, SimulatedGpu, Any]:
        context = simulated_engine(timing, **settings)
        engine, made = context.__enter__()
        left.append(context)
        model, program = lab.Affine(2.0), lab.program()

        def go(slots: int) -> float:
            begun, ended = time.perf_counter(), threading.Semaphore(0)
            instance = engine.instance(program, model.tensors())
            for request in engine.submit_all([(instance, [lab.x()], Quota("t"))] * slots):
                request.add_done_callback(lambda _: ended.release())
            engine.kick()
            for _ in range(slots):
                assert ended.acquire(timeout=20)
            return time.perf_counter() - begun

        go(1)
        for slots in sizes:
            go(slots)
            assert engine.quiesce(20)
        return engine, made[0], go

    yield make
    for context in left:
        context.__exit__(None, None, None)


def captured(device: SimulatedGpu) -> list[int]:
    return [slots for _, slots, _ in device.capturer.captured]


def test_a_size_that_a_larger_graph_serves_is_captured_when_it_has_come_often(gpu: Any, lab: Any) -> None:
    engine, device, go = gpu(Timing(capture=1e-3), 1, 8)
    assert captured(device) == [1, 8]
    for _ in range(3):
        for slots in (4, 5, 6, 7):
            go(slots)
    time.sleep(0.1)
    assert captured(device) == [1, 8]
    for _ in range(64):
        go(5)
    lab.until(lambda: captured(device) == [1, 8, 5])
    assert engine.quiesce(20)  # who waits for quiet wants what came
    assert sorted(captured(device)) == [1, 4, 5, 6, 7, 8]
    assert engine.quiesce(20) and len(captured(device)) == 6


def test_a_size_without_any_graph_is_captured_at_once_and_serves_smaller_ones(gpu: Any, lab: Any) -> None:
    engine, device, go = gpu(Timing(capture=30e-3), 1)
    gate = threading.Event()
    engine.compile_thread.submit(lambda: gate.wait(10))
    for slots in (12, 7, 10):
        go(slots)
    gate.set()
    lab.until(lambda: engine.compile_thread.finished >= 6)
    assert captured(device) == [1, 12]
    assert [plan.captured for plan in engine.plans()] == [((1, 12),)]


def test_a_new_size_is_served_by_the_graphs_there_are_and_nobody_waits_for_launches(gpu: Any) -> None:
    """A bundle of a new size that is launched one by one keeps the role, and with it everybody, for long."""
    engine, device, go = gpu(Timing(launches=0.2, capture=1e-3), 1, 2)
    gate = threading.Event()
    engine.compile_thread.submit(lambda: gate.wait(10))  # no capture comes meanwhile
    assert max(go(slots) for slots in (3, 4, 6, 6)) < 0.2
    assert captured(device) == [1, 2]
    gate.set()
    assert engine.quiesce(20)
    assert sorted(captured(device)) == [1, 2, 3, 4, 6]


def test_requests_get_the_interpreter_while_something_compiles(gpu: Any) -> None:
    """With Python's interval each of some four handovers a request takes 5 ms."""
    engine, _, go = gpu(Timing(), 1, switch_interval=1e-4)

    def latency() -> float:
        go(1)  # somebody is being served
        stop = threading.Event()

        def job() -> None:
            while not stop.is_set():
                burn(1e-3)

        engine.compile_thread.submit(job)
        try:
            return statistics.median(go(1) for _ in range(40))
        finally:
            stop.set()
            assert engine.quiesce(20)

    ours = latency()
    engine.configure(replace(engine.settings, switch_interval=0.0))
    assert latency() > 3 * ours


def test_a_model_that_is_new_does_not_wait_for_a_capture(gpu: Any, lab: Any) -> None:
    """Who dispatches for everybody writes its row; a graph over tables that moved meanwhile is not used."""
    engine, device, go = gpu(Timing(capture=1.0), 1)
    (served,) = engine._served.values()
    begun = len(captured(device))
    before = served.storage.generation
    go(40)
    lab.until(lambda: engine.compile_thread.busy)
    model = lab.Affine(3.0)
    instance, moment = engine.instance(lab.program(), model.tensors()), time.perf_counter()
    (request,) = engine.submit_all([(instance, [lab.x()], Quota("new"))])
    engine.kick()
    lab.until(request.done, 10.0)
    assert time.perf_counter() - moment < 0.5
    assert engine.compile_thread.busy and len(captured(device)) == begun
    served.storage.generation = before + 1
    assert engine.quiesce(20)
    go(1)
    assert engine.quiesce(20)
    assert captured(device)[begun:] == [40, 1]
    assert engine.plans()[0].captured == ((1,),)


def test_a_lane_without_graphs_has_its_bundles_served_by_another(gpu: Any, lab: Any) -> None:
    """Nor is a program that moves, or goes on a further lane, launched one by one there."""
    engine, device, go = gpu(Timing(lambda name, slots: 5e-3, launches=0.3, capture=1e-3), 1)
    engine.configure(replace(engine.settings, lanes=2, branches=1, max_bundle=1))
    gate = threading.Event()
    engine.compile_thread.submit(lambda: gate.wait(10))  # no capture comes meanwhile
    flights: list[Any] = []
    launch = device.launch
    device.launch = lambda bundle: flights.append((bundle.lane, launch(bundle))) or flights[-1][1]
    begun = time.perf_counter()
    go(4)
    assert time.perf_counter() - begun < 0.3
    assert {lane for lane, _ in flights} == {0, 1}
    assert len({flight.way for _, flight in flights}) == 1
    # All of them followed each other on the stream of the graph, and no lane has anything left.
    moments = sorted((flight.start.event.at, flight.end.event.at) for _, flight in flights)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(moments))
    assert not any(load.bundles for load in device.loads())
    gate.set()
    assert engine.quiesce(20)
    assert engine.plans()[0].captured == ((1,), (1,))
    flights.clear()
    go(4)
    spans = [(flight.start.event.at, flight.end.event.at) for lane, flight in flights]
    assert any(a[0] < b[0] < a[1] for a, b in itertools.permutations(spans, 2)), "each lane has its own now"

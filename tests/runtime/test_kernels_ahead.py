"""Kernels of all bundle sizes are compiled off the request path: the first ones before a plan serves."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from clocks import Told
from torch import nn

import torch_mux
from torch_mux import state
from torch_mux.lowering.kernels.ahead import Builder
from torch_mux.lowering.kernels.transport import gather, scatter
from torch_mux.runtime.compile_thread import CompileThread, Rank
from torch_mux.runtime.executors.capture import Capturer, Steps


class Recorded(Builder):
    """Notes the sizes that it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[list[int]] = []

    def finish(self, launches: Iterable[Any]) -> None:
        self.asked.append([launch.slots for launch in launches])


def _capturer(thread: CompileThread, builder: Builder) -> Capturer:
    steps: Any = SimpleNamespace(launches=lambda served, slots: [SimpleNamespace(slots=slots)])
    return Capturer(thread, steps, threading.RLock(), builder)


class Served:
    """What of a served program is read here."""

    compiled = SimpleNamespace(capturable=False)
    program = SimpleNamespace(device=torch.device("cpu"))


def _served() -> Any:
    return Served()


def test_the_first_sizes_now_and_all_others_later() -> None:
    thread, builder = CompileThread(), Recorded()
    _capturer(thread, builder).rehearse(_served(), most=9)
    assert builder.asked[0] == [1, 2, 16]
    assert thread.quiesce(10, Rank.AHEAD)
    assert builder.asked[1:] == [[4], [8], [3], [5], [6], [7], [9]]
    thread.close(10)


def test_the_end_of_a_job_is_no_quiet_moment(lab: Any) -> None:
    clock, done = Told(), threading.Event()
    thread = CompileThread(quiet=0.05, clock=clock)

    def slow() -> None:
        clock.now += 0.07

    thread.submit(slow)
    thread.submit(done.set, Rank.AHEAD)
    lab.until(lambda: thread.finished == 1)
    assert not done.wait(0.15)
    clock.now += 0.051
    assert done.wait(10)
    thread.close(10)


@pytest.mark.parametrize("awaited", [False, True])
def test_what_nobody_waits_for_is_compiled_one_after_another(awaited: bool) -> None:
    thread, builder = CompileThread(quiet=30.0 if awaited else 0.0), Recorded()
    thread.stir()
    steps: Any = SimpleNamespace(launches=lambda served, slots: [SimpleNamespace(slots=slots)] * 3)
    served = _served()
    Capturer(thread, steps, threading.RLock(), builder).rehearse(served, most=3)
    if awaited:
        assert thread.quiesce(10, Rank.AHEAD)
    deadline = time.monotonic() + 10
    while sum(map(len, builder.asked[1:])) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert builder.asked[1:] == ([[3, 3, 3]] if awaited else [[3], [3], [3]])
    thread.close(10)


def test_a_forgotten_program_is_compiled_no_further() -> None:
    thread, builder = CompileThread(), Recorded()
    gate = threading.Event()
    thread.submit(lambda: gate.wait(10))
    capturer, served = _capturer(thread, builder), _served()
    capturer.rehearse(served, most=64)
    capturer.forget(served)
    gate.set()
    assert thread.quiesce(10, Rank.AHEAD)
    assert builder.asked == [[1, 2, 16]]
    thread.close(10)


def test_ranks_order_the_jobs_and_what_nobody_asked_for_is_not_awaited() -> None:
    thread, order = CompileThread(), []
    entered, gate, ahead = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        entered.set()
        gate.wait(10)

    thread.submit(first)
    assert entered.wait(10)
    thread.submit(lambda: (ahead.wait(10), order.append("ahead")), Rank.AHEAD)
    thread.submit(lambda: order.append("capture"))
    thread.submit(lambda: order.append("plan"), Rank.URGENT)
    gate.set()
    assert thread.quiesce(10)
    assert order == ["plan", "capture"]
    ahead.set()
    assert thread.quiesce(10, Rank.AHEAD)
    assert order == ["plan", "capture", "ahead"]
    thread.close(10)


def test_what_nobody_asked_for_waits_for_a_quiet_moment() -> None:
    clock, done = Told(), threading.Event()
    thread = CompileThread(quiet=0.05, clock=clock)
    thread.submit(done.set, Rank.AHEAD)
    assert done.wait(10), "nothing was under way before"
    done.clear()
    for _ in range(4):
        clock.now += 0.04
        thread.stir()
        thread.submit(done.set, Rank.AHEAD)
        assert not done.wait(0.06)
    clock.now += 0.04
    asked = threading.Event()
    thread.submit(asked.set)
    assert asked.wait(10)
    clock.now += 0.04
    assert not done.wait(0.06)
    clock.now += 0.02
    assert done.wait(10)
    assert thread.quiesce(10, Rank.AHEAD)
    done.clear()
    thread.stir()
    thread.submit(done.set, Rank.AHEAD)
    assert thread.quiesce(10, Rank.AHEAD) and done.is_set(), "somebody waits for it"
    thread.close(10)


def test_a_bundles_launches_are_known_without_a_device(lab: Any) -> None:
    program = lab.program()
    served: Any = SimpleNamespace(program=program, compiled=SimpleNamespace(launches=lambda slots: []))
    launches = Steps(lab.stack, gather, scatter).launches(served, 6)
    assert [launch.kernel.__name__ for launch in launches] == ["dense_kernel"] * 3
    assert [launch.arguments["TO_BATCH"] for launch in launches] == [True, False, False]
    assert all(launch.arguments["slots"] == 6 for launch in launches)


@pytest.mark.gpu
def test_a_size_never_seen_compiles_no_super_kernel() -> None:
    nets = [nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)) for _ in range(5)]
    models = [torch.compile(net.eval().half().cuda(), backend="mux", dynamic=False) for net in nets]
    x, compiled = torch.randn(64, 256, device="cuda", dtype=torch.float16), []
    with torch.inference_mode():
        for model in models:
            torch_mux.gather((model, x))
        assert state.engine().compile_thread.quiesce(300, Rank.AHEAD)
        triton.knobs.runtime.jit_cache_hook = lambda **found: compiled.append(found["repr"])
        try:
            torch_mux.gather(*((model, x) for model in models))
            torch_mux.gather(*[(models[0], x)] * 24)
            assert state.engine().compile_thread.quiesce(300, Rank.AHEAD)
        finally:
            triton.knobs.runtime.jit_cache_hook = None
    assert compiled == []

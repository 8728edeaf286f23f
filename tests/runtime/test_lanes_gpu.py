"""Lanes of one GPU: same bits, overlap, rows written for both, multiprocessors of their own."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_mux
from torch_mux import compat
from torch_mux.compat import native
from torch_mux.compat.driver import call
from torch_mux.runtime.scheduler.base import Issue
from torch_mux.types import Quota

pytestmark = pytest.mark.gpu

CUDA = "cuda:0"
OTHERS, LATENT = Quota("others"), Quota("latent", reserve=0.25)
MODES = ("off", "priority", "caps", "green")


@pytest.fixture(autouse=True)
def built() -> None:
    native.build()


def spin(milliseconds: float) -> None:
    """Keeps the current stream busy, on one multiprocessor."""
    torch.cuda._sleep(int(milliseconds * 1.5e6))


class Gate:
    """Where a stream waits until the host lets it pass."""

    def __init__(self) -> None:
        self._word = torch.zeros(1, dtype=torch.int32).pin_memory()

    def hold(self) -> None:
        """The current stream waits from here on."""
        stream = torch.cuda.current_stream().cuda_stream
        address, value, at_least = (
            ctypes.c_uint64(self._word.data_ptr()),
            ctypes.c_uint32(1),
            ctypes.c_uint(0),
        )
        call("cuStreamWaitValue32_v2", ctypes.c_void_p(stream), address, value, at_least)

    def open(self) -> None:
        """It goes on."""
        self._word.fill_(1)


def ready(engine: Any, program: Any) -> None:
    engine.register(program)
    assert engine.quiesce(60)


def watched(engine: Any) -> list[Any]:
    """The flights that are launched from now on, with their events."""
    executor = engine._dispatchers[torch.device(CUDA)].executor
    flights, launch = [], executor.launch

    def launching(bundle: Any) -> Any:
        flights.append(launch(bundle))
        return flights[-1]

    executor.launch = launching
    return flights


def gated(lab: Any) -> tuple[Any, Gate, list[Any], Callable[..., Any], Callable[..., Any]]:
    """An engine; what holds others; the flights from now on; what submits for others, and for latent."""
    engine = lab.gpu_engine(capture=False)
    long, short = lab.program("long", device=CUDA), lab.program("short", device=CUDA)
    ready(engine, long)
    ready(engine, short)
    others = partial(lab.submit, engine, long, lab.Affine(2.0, CUDA), quota=OTHERS)
    latent = partial(lab.submit, engine, short, lab.Affine(3.0, CUDA), quota=LATENT)
    for submit in (others, latent):
        submit().result()
    torch.cuda.synchronize()
    gate = Gate()
    lab.plans["long"].before = lambda inputs: gate.hold()
    return engine, gate, watched(engine), others, latent


def test_a_bundle_runs_while_a_long_one_of_others_is_under_way(lab: Any) -> None:
    engine, gate, flights, others, latent = gated(lab)
    try:
        engine.wait([others(value=1.0)])
        own = torch.cuda.Stream()  # the other client's waits for the long bundle from here on
        with torch.cuda.stream(own):
            request = latent(value=2.0)
            engine.wait([request])
        slow, quick = flights
        lab.until(quick.end.event.query)
        assert not slow.end.event.query()
        time.sleep(0.06)
    finally:
        gate.open()
    slow.end.wait()
    assert slow.start.event.elapsed_time(quick.start.event) > 0.0
    assert quick.end.event.elapsed_time(slow.end.event) > 50.0
    assert (quick.bundle.lane, slow.bundle.lane) == (1, 0)
    assert request.result()[0][0].item() == 6.0
    lab.until(lambda: engine.stats().bundles == 4)
    stats = engine.stats()
    whole = slow.start.event.elapsed_time(slow.end.event) * 1e-3
    assert stats.device_seconds < whole + 0.05, "the time in which both were under way counts once"


def test_a_kicked_one_goes_out_while_the_end_of_a_bundle_of_others_is_waited_for(lab: Any) -> None:
    engine, gate, flights, others, latent = gated(lab)
    told = threading.Event()
    try:
        slow = others(value=1.0)
        slow.add_done_callback(lambda _: told.set())
        engine.kick()
        lab.until(lambda: len(flights) == 1)
        time.sleep(0.05)  # the dispatcher's thread waits for its end by now, without the interpreter's lock
        with torch.cuda.stream(torch.cuda.Stream()):
            quick = latent(value=2.0)
            engine.kick()
            lab.until(lambda: quick.out)
            lab.until(flights[1].end.event.query)
            assert quick.result()[0][0].item() == 6.0
        assert not told.is_set() and not flights[0].end.event.query()
    finally:
        gate.open()
    assert told.wait(10)
    assert slow.result()[0][0].item() == 2.0


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("isolation", MODES)
def test_bits_are_those_of_the_first_lane(lab: Any, isolation: str, capture: bool) -> None:
    engine = lab.gpu_engine(capture=capture)
    program = lab.program(device=CUDA)
    ready(engine, program)
    models = [lab.Affine(1.0 + 0.37 * number, CUDA) for number in range(5)]
    inputs = [torch.randn(4, device=CUDA) for _ in models]

    def together(quotas: list[Quota]) -> list[list[Tensor]]:
        calls = [
            (engine.instance(program, model.tensors()), [x], quota)
            for model, x, quota in zip(models, inputs, quotas, strict=True)
        ]
        requests = engine.submit_all(calls)
        engine.wait(requests)
        return [request.result() for request in requests]

    want = together([OTHERS] * 5)
    engine.configure(replace(engine.settings, isolation=isolation))
    for quotas in ([LATENT] * 5, [OTHERS] * 5, [LATENT, OTHERS] * 2 + [LATENT]):
        for _ in range(3):
            for got, expected in zip(together(quotas), want, strict=True):
                assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
            assert engine.quiesce(60)
    assert engine.plans()[0].capture_failures == ()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(32, 64, 3, padding=1)
        self.norm = nn.BatchNorm2d(64)
        self.fc = nn.Linear(64, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))


@pytest.mark.parametrize("isolation", MODES[1:])
def test_super_kernels_have_the_same_bits_on_any_lane_beside_others(isolation: str) -> None:
    """Two models at once on two lanes, captured and capped, against each alone on the first lane."""
    torch.manual_seed(0)
    torch_mux.reset()
    models = [torch.compile(Net().eval().half().to(CUDA), backend="mux") for _ in range(4)]
    inputs = [torch.randn(1, 32, 24, 24, device=CUDA, dtype=torch.half) for _ in models]
    with torch.inference_mode():
        want = [torch_mux.gather((model, x))[0] for model, x in zip(models, inputs, strict=True)]
        torch_mux.configure(isolation=isolation)
        for _ in range(20):
            futures = []
            for number, (model, x) in enumerate(zip(models, inputs, strict=True)):
                with torch_mux.quota(f"t{number}", reserve=0.3 if number % 2 else 0.0):
                    futures.append(torch_mux.submit(model, x))
            for future, expected in zip(futures, want, strict=True):
                assert torch.equal(future.result(), expected)
    torch_mux.reset()


@pytest.mark.parametrize("isolation", ["caps", "green"])
def test_a_row_written_for_one_lane_is_read_by_the_other(lab: Any, isolation: str) -> None:
    engine = lab.gpu_engine(isolation=isolation)
    program = lab.program(device=CUDA)
    ready(engine, program)
    model = lab.Affine(1.0, CUDA)
    for step in range(1, 30):
        first, second = (LATENT, OTHERS) if step % 2 else (OTHERS, LATENT)
        with torch.no_grad():
            spin(0.5)
            model.weight.fill_(float(step))
        requests = [lab.submit(engine, program, model, 2.0, quota) for quota in (first, second, first)]
        engine.wait(requests)
        assert [request.result()[0][0].item() for request in requests] == [2.0 * step] * 3
    assert lab.plans["affine"].storage.refreshes >= 28


def test_prepared_copies_are_written_for_both_lanes() -> None:
    torch.manual_seed(1)
    torch_mux.reset()
    module = Net().eval().half().to(CUDA)
    model = torch.compile(module, backend="mux")
    x = torch.randn(1, 32, 24, 24, device=CUDA, dtype=torch.half)
    with torch.inference_mode():
        torch_mux.gather((model, x))
    last = None
    for step in range(20):
        with torch.no_grad():
            spin(0.5)
            module.norm.weight.mul_(1.1)  # folded into a copy of the convolution's weight
            module.fc.weight.add_(0.01)
        with torch.inference_mode():
            futures = []
            for reserve in (0.25, 0.0) if step % 2 else (0.0, 0.25):
                with torch_mux.quota(f"t{reserve}", reserve=reserve):
                    futures.append(torch_mux.submit(model, x))
            first, second = (future.result() for future in futures)
            (alone,) = torch_mux.gather((model, x))
            assert torch.equal(first, alone) and torch.equal(second, alone)
            assert last is None or not torch.equal(last, alone)
            torch.testing.assert_close(alone, module(x), rtol=2e-2, atol=5e-2)
        last = alone
    torch_mux.reset()


def test_new_rows_while_the_other_lane_is_busy(lab: Any) -> None:
    """A new row may move the tables that a bundle on the other lane reads."""
    engine = lab.gpu_engine(capture=False)
    program = lab.program(device=CUDA)
    ready(engine, program)
    models = [lab.Affine(float(number), CUDA) for number in range(1, 20)]
    lab.plans["affine"].before = lambda inputs: spin(1.0)
    requests = [
        lab.submit(engine, program, model, 3.0, LATENT if number % 2 else OTHERS)
        for number, model in enumerate(models)
        for _ in range(2)
    ]
    engine.wait(requests)
    want = [3.0 * number for number in range(1, 20) for _ in range(2)]
    assert [request.result()[0][0].item() for request in requests] == want


def ids(stream: torch.cuda.Stream, recorder: torch.cuda.Stream | None = None) -> set[int]:
    """The multiprocessors that a kernel with many programs runs on, launched or captured and replayed."""
    from gpu_places import places

    found = torch.full((4096,), -1, dtype=torch.int32, device=CUDA)
    torch.cuda.synchronize()
    if recorder is None:
        with torch.cuda.stream(stream):
            places(found)
        stream.synchronize()  # the device's own synchronisation does not reach streams of green contexts
    else:
        with torch.cuda.stream(recorder):
            places(found)
            recorder.synchronize()
            found.fill_(-1)
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")
            places(found)
            graph.capture_end()
        recorder.synchronize()
        with torch.cuda.stream(stream):
            graph.replay()
        stream.synchronize()
    return set(found.tolist())


def test_green_lanes_run_on_multiprocessors_of_their_own(lab: Any) -> None:
    engine = lab.gpu_engine(isolation="green", capture=False)
    program = lab.program(device=CUDA)
    ready(engine, program)
    model = lab.Affine(1.0, CUDA)
    lab.submit(engine, program, model, quota=OTHERS).result()
    lab.plans["affine"].before = lambda inputs: spin(50.0)
    for quota in (LATENT, OTHERS):  # the second while the first is under way
        lab.submit(engine, program, model, quota=quota).result()
    lanes = {lane.index: lane for lane in engine._dispatchers[torch.device(CUDA)].executor._lanes}
    own, rest = lanes[1], lanes[2]
    total = torch.cuda.get_device_properties(CUDA).multi_processor_count
    assert 0.25 * total <= own.context.sms <= 0.25 * total + compat.green.GROUP
    assert own.context.sms + rest.context.sms <= total
    for recorders in (None, None), (own.recorder, rest.recorder):
        mine, others = ids(own.stream, recorders[0]), ids(rest.stream, recorders[1])
        assert 0 < len(mine) <= own.context.sms and 0 < len(others) <= rest.context.sms
        assert not mine & others


def test_another_reserve_is_another_part_of_the_device(lab: Any) -> None:
    engine = lab.gpu_engine(isolation="green")
    program = lab.program(device=CUDA)
    ready(engine, program)
    model = lab.Affine(2.0, CUDA)
    executor = None
    for reserve in (0.25, 0.5, 0.25):
        requests = [lab.submit(engine, program, model, 2.0, Quota("a", reserve=reserve)) for _ in range(3)]
        engine.wait(requests)
        assert [request.result()[0][0].item() for request in requests] == [4.0] * 3
        executor = requests[0].dispatcher.executor
        issue = Issue("", (), 1.0, lane=1, reserve=reserve)
        assert executor._lanes.take(issue).context.sms >= reserve * executor.sms


def test_the_reserved_lane_goes_first() -> None:
    from torch_mux.runtime.lanes import Lane, highest_priority

    lane = Lane(1, torch.device(CUDA), highest_priority())
    assert lane.stream.priority < torch.cuda.Stream(CUDA).priority

"""Segments on a GPU: a stop waits, a more urgent bundle goes first, answers keep their bits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_mux
from torch_mux import state

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda:0")
LAYERS, ROWS, WIDTH, SLOTS = 60, 2048, 2048, 4
SEGMENT = 1e-3


@pytest.fixture(autouse=True)
def built() -> Iterator[None]:
    from torch_mux.compat import native

    native.build()
    torch_mux.reset()
    yield
    torch_mux.reset()


class Long(nn.Module):
    """Some milliseconds of large products."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(LAYERS):
            x = self.layer(x).relu()
        return x


def event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def test_a_stop_waits_for_who_overtakes_on_another_stream() -> None:
    from torch_mux.lowering.kernels.gates import Gate

    gate = Gate(CUDA)
    sms = torch.cuda.get_device_properties(CUDA).multi_processor_count
    control = torch.tensor([1, 1], dtype=torch.int32, device=CUDA)
    own = torch.tensor([1, sms], dtype=torch.int32, device=CUDA)
    for ends in (False, True):
        gate.overtake(ends).build()
    gate.stop(control, own).build()
    torch.cuda.synchronize()
    stopped, passing = torch.cuda.Stream(CUDA), torch.cuda.Stream(CUDA, priority=-1)
    with torch.cuda.stream(passing):
        gate.overtake(ends=False).start()
    passing.synchronize()
    done = event()
    with torch.cuda.stream(stopped):
        gate.stop(control, own).start()
        done.record(stopped)
    time.sleep(0.02)
    assert not done.query(), "it went on while somebody overtakes"
    with torch.cuda.stream(passing):
        gate.overtake(ends=True).start()
    done.synchronize()
    assert control.tolist() == [1, sms] and gate.words.tolist() == [1, 1, sms]


def served(**settings: Any) -> tuple[list[Any], Any, Tensor, Tensor, list[Tensor], Tensor]:
    """Long models and a short one, with inputs and what each answers alone without segments."""
    torch.manual_seed(0)
    with torch.inference_mode(False):  # weights that may be written later
        modules = [Long().eval().half().to(CUDA) for _ in range(SLOTS)]
        layers = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64)).eval().half().to(CUDA)
    long = [torch.compile(module, backend="mux", dynamic=False) for module in modules]
    short = torch.compile(layers, backend="mux", dynamic=False)
    x = torch.randn(ROWS, WIDTH, device=CUDA, dtype=torch.half)
    y = torch.randn(4, 256, device=CUDA, dtype=torch.half)
    torch_mux.configure(isolation="off")
    want = [torch_mux.gather((model, x))[0] for model in long]
    (small,) = torch_mux.gather((short, y))
    torch_mux.configure(**{"pack": 1, **settings})
    return long, short, x, y, want, small


def flights_of(engine: Any) -> list[Any]:
    executor = engine._dispatchers[CUDA].executor
    found, launch = [], executor.launch

    def launching(bundle: Any) -> Any:
        found.append(launch(bundle))
        return found[-1]

    executor.launch = launching
    return found


def races(long: list[Any], short: Any, x: Tensor, y: Tensor, quota: Any, count: int) -> list[Any]:
    """So often: all long models at once, and the short one soon after they began; their answers."""
    answers = []
    for _ in range(count):
        with torch_mux.quota("long"):
            futures = [torch_mux.submit(model, x) for model in long]
        time.sleep(1e-3)
        with quota:
            last = torch_mux.submit(short, y)
        answers.append(([future.result() for future in futures], last.result()))
        torch.cuda.synchronize()
    return answers


@pytest.mark.parametrize("isolation", ["off", "caps"])
def test_a_higher_class_goes_between_two_segments_and_nobody_s_bits_change(isolation: str) -> None:
    with torch.inference_mode():
        long, short, x, y, want, small = served(segment=SEGMENT, isolation=isolation)
        engine = state.engine()
        high = torch_mux.quota("high", priority=1)
        for _ in range(4):  # graphs of both lanes, and forecasts
            races(long, short, x, y, high, 4)
            assert engine.quiesce(120)
        segments = {program.name: program.segments for program in torch_mux.explain().programs}
        assert segments["Long"] >= 3 and segments["Sequential"] == 1
        flights = flights_of(engine)
        answers = races(long, short, x, y, high, 20)
        for got, last in answers:
            assert torch.equal(last, small)
            assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
        overtook = 0
        slow: Any = None
        for flight in flights:
            if flight.bundle.served.program.name == "Long":
                slow = flight
            elif flight.bundle.issue.passes:
                ahead = flight.end.event.elapsed_time(slow.end.event)
                overtook += ahead > 0.0
        # Without segments none does; beside other processes some come when the long one is almost over.
        assert overtook >= 10, f"{overtook} of 20 ended before what was under way"
        plans = [plan for plan in engine.plans() if plan.capture_failures]
        assert plans == []


def test_a_reserve_takes_its_part_at_a_stop_and_gives_it_back() -> None:
    """Beside it the caps of later segments change; no bits do, and in the end nothing is claimed."""
    with torch.inference_mode():
        long, short, x, y, want, small = served(segment=SEGMENT, isolation="caps")
        reserved = torch_mux.quota("reserved", reserve=0.25)
        engine = state.engine()
        for _ in range(3):
            races(long, short, x, y, reserved, 4)
            assert engine.quiesce(120)
        for got, last in races(long, short, x, y, reserved, 20):
            assert torch.equal(last, small)
            assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
        executor: Any = engine._dispatchers[CUDA].executor
        sms = executor.sms
        assert executor._capturer._segmenter._gate.words.tolist() == [0, 0, sms]


def test_what_waits_for_a_stopped_bundle_does_not_stop_it() -> None:
    """Who overtakes waits for an event behind the bundle that would stop for it: nobody hangs."""
    with torch.inference_mode():
        long, short, x, y, _, small = served(segment=SEGMENT, isolation="off")
        engine = state.engine()
        high = torch_mux.quota("high", priority=1)
        for _ in range(3):
            races(long, short, x, y, high, 4)
            assert engine.quiesce(120)
        for _ in range(10):
            futures = [torch_mux.submit(model, x) for model in long]
            answers = [future.result() for future in futures]  # this stream waits for them from here on
            behind = y + 0.0 * answers[0][0, 0].clamp(0, 1)
            with high:
                last = torch_mux.submit(short, behind)
            result = last.result()
            torch.cuda.synchronize()
            assert torch.equal(result, small)


def test_changed_weights_are_written_while_somebody_is_stopped() -> None:
    with torch.inference_mode():
        long, short, x, y, want, _ = served(segment=SEGMENT, isolation="off")
        engine = state.engine()
        high = torch_mux.quota("high", priority=1)
        for _ in range(3):
            races(long, short, x, y, high, 4)
            assert engine.quiesce(120)
    module: Any = short._orig_mod
    for step in range(10):
        with torch.no_grad():
            module[2].bias.fill_(float(step))
        with torch.inference_mode():
            ((got, last),) = races(long, short, x, y, high, 1)
            expected = module(y)
            torch.testing.assert_close(last, expected, rtol=2e-2, atol=2e-2)
            assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_a_mix_that_is_cut_has_the_same_bits() -> None:
    with torch.inference_mode():
        long, short, x, y, want, small = served(segment=SEGMENT, isolation="off", pack=8, pack_after=0)
        engine = state.engine()
        high = torch_mux.quota("high", priority=1)
        calls = [*((model, x) for model in long), (short, y)]
        for _ in range(8):
            *got, last = torch_mux.gather(*calls)
            assert engine.quiesce(120)
            races(long, short, x, y, high, 1)
            assert torch.equal(last, small)
            assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
        mixes = torch_mux.explain().mixes
        assert any(mix.joint > 0 for mix in mixes), mixes
        torch.cuda.synchronize()

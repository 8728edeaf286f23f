"""The CUDA executor: same bits, streams, lifetimes and captures."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_mux.compat import native
from torch_mux.errors import StreamCaptured
from torch_mux.runtime import lanes
from torch_mux.runtime.scheduler.base import View
from torch_mux.runtime.scheduler.policy import FairPolicy
from torch_mux.types import Quota

pytestmark = pytest.mark.gpu

CUDA = "cuda:0"


@pytest.fixture(autouse=True, params=["native", "torch"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test twice: bundles enqueued by one native call, and by calls of torch."""
    native.build()
    if request.param == "torch":
        monkeypatch.setitem(native._state, "enqueue", None)
    else:
        assert native.enqueue() is not None, native.status()


def work(rounds: int = 40) -> Tensor:
    """Keeps the current stream busy for some milliseconds."""
    a = torch.full((2048, 2048), 1 / 2048, device=CUDA)  # its own square
    for _ in range(rounds):
        a = a @ a
    return a


def served(engine: Any, lab: Any, count: int, name: str = "affine") -> tuple[Any, list[Any]]:
    program = lab.program(name, device=CUDA)
    engine.register(program)
    assert engine.quiesce(60)
    return program, [lab.Affine(1.0 + 0.37 * number, CUDA) for number in range(count)]


def bundle(engine: Any, lab: Any, program: Any, models: list[Any], value: float = 3.0) -> list[list[Tensor]]:
    calls = [(engine.instance(program, m.tensors()), [lab.x(value, CUDA)], Quota()) for m in models]
    requests = engine.submit_all(calls)
    engine.wait(requests)
    return [request.result() for request in requests]


@pytest.mark.parametrize("capture", [False, True])
def test_direct_captured_and_padded_have_the_same_bits(lab: Any, capture: bool) -> None:
    engine = lab.gpu_engine(capture=capture)
    program, models = served(engine, lab, 8)
    alone = [bundle(engine, lab, program, [model])[0] for model in models]
    for size in (8, 5, 3, 2):
        for _ in range(2):
            for got, want in zip(bundle(engine, lab, program, models[:size]), alone, strict=False):
                assert torch.equal(got[0], want[0])
                assert torch.equal(got[1], want[1])
            assert engine.quiesce(60)
    assert engine.plans()[0].capture_failures == ()
    assert engine.plans()[0].captured == (((1, 2, 3, 5, 8),) if capture else ((),))


def test_graphs_of_other_sizes_one_after_another_have_the_same_bits(lab: Any) -> None:
    engine = lab.gpu_engine()
    program, models = served(engine, lab, 8)
    alone = [bundle(engine, lab, program, [model], 3.0 + n)[0] for n, model in enumerate(models)]
    for size in (1, 2):
        bundle(engine, lab, program, models[:size])
        assert engine.quiesce(60)
    gate = threading.Event()
    engine.compile_thread.submit(lambda: gate.wait(60))  # nothing is captured meanwhile
    before = len(lab.plans["affine"].bundles)
    for size in (7, 3, 8, 5):
        calls = [
            (engine.instance(program, model.tensors()), [lab.x(3.0 + n, CUDA)], Quota())
            for n, model in enumerate(models[:size])
        ]
        requests = engine.submit_all(calls)
        engine.wait(requests)
        for request, want in zip(requests, alone, strict=False):
            assert all(torch.equal(a, b) for a, b in zip(request.result(), want, strict=True))
    assert len(lab.plans["affine"].bundles) == before, "they were launched one by one"
    gate.set()
    assert engine.quiesce(60)
    assert engine.plans()[0].captured == ((1, 2, 3, 5, 7, 8),)


def test_a_lane_without_graphs_has_its_bundles_served_by_another(lab: Any) -> None:
    engine = lab.gpu_engine()
    program, models = served(engine, lab, 3)
    want = bundle(engine, lab, program, models)
    assert engine.quiesce(60)
    gate = threading.Event()
    engine.compile_thread.submit(lambda: gate.wait(60))  # nothing is captured meanwhile
    before = len(lab.plans["affine"].bundles)

    def reserved() -> list[list[Tensor]]:
        quota = Quota("latent", reserve=0.25)
        calls = [(engine.instance(program, m.tensors()), [lab.x(3.0, CUDA)], quota) for m in models]
        requests = engine.submit_all(calls)
        engine.wait(requests)
        return [request.result() for request in requests]

    def check(got: list[list[Tensor]]) -> None:
        for one, other in zip(got, want, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    for _ in range(4):
        check(reserved())
    assert len(lab.plans["affine"].bundles) == before, "they were launched one by one"
    gate.set()
    assert engine.quiesce(60)
    assert engine.plans()[0].captured == ((3,), (3,))
    check(reserved())


def test_a_request_inside_of_a_users_capture_is_refused_and_harms_nobody(lab: Any) -> None:
    engine = lab.gpu_engine()
    program, models = served(engine, lab, 2)
    want = bundle(engine, lab, program, models)
    graph, y = torch.cuda.CUDAGraph(), torch.zeros(8, device=CUDA)
    with torch.cuda.graph(graph):
        with pytest.raises(StreamCaptured, match="outside"):
            bundle(engine, lab, program, models)
        y += 1
    graph.replay()
    assert y.sum().item() == 8.0
    got = bundle(engine, lab, program, models)
    assert all(
        torch.equal(a, b)
        for one, other in zip(got, want, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def test_a_users_capture_and_ours_do_not_end_each_other(lab: Any) -> None:
    engine = lab.gpu_engine()
    program, models = served(engine, lab, 5)
    bundle(engine, lab, program, models)
    graph, y = torch.cuda.CUDAGraph(), torch.zeros(8, device=CUDA)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):  # while the compile thread captures the bundle's size
        assert engine.quiesce(60)
        y += 1
    graph.replay()
    assert y.sum().item() == 8.0
    assert engine.plans()[0].capture_failures == ()
    assert engine.plans()[0].captured == ((5,),)


def test_a_captured_size_runs_no_python(lab: Any) -> None:
    engine = lab.gpu_engine()
    program, models = served(engine, lab, 4)
    bundle(engine, lab, program, models)
    assert engine.quiesce(60)
    plan = lab.plans["affine"]
    plan.bundles.clear()
    answers = bundle(engine, lab, program, models, 5.0)
    padded = bundle(engine, lab, program, models[:3], 7.0)
    torch.cuda.synchronize()
    assert [answer[0][0].item() for answer in answers] == [(5.0 * m.weight)[0].item() for m in models]
    assert [answer[0][0].item() for answer in padded] == [(7.0 * m.weight)[0].item() for m in models[:3]]
    assert engine.quiesce(60)
    assert set(plan.bundles) <= {3}  # nothing but the capture of the size that was padded


def test_a_call_waits_for_the_callers_stream_and_the_stream_for_the_call(lab: Any) -> None:
    engine = lab.gpu_engine()
    program, (model,) = served(engine, lab, 1)
    for _ in range(4):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            x = torch.zeros(4, device=CUDA)
            busy = work()
            x.add_(2.0).add_(busy[0, :4] * 0)
            y = engine.call(program, [*model.tensors(), x], Quota())[0]
            z = y * 10
            # Without synchronisation the input is gone at once, and its memory used again.
            del x
            noise = [torch.full((4,), float("nan"), device=CUDA) for _ in range(64)]
        side.synchronize()
        assert z.tolist() == (20 * model.weight).tolist()
        assert len(noise) == 64


def test_outputs_dropped_at_once_harm_nobody(lab: Any) -> None:
    engine = lab.gpu_engine()
    program, models = served(engine, lab, 2)
    for _ in range(20):
        work(4)
        engine.call(program, [*models[0].tensors(), lab.x(2.0, CUDA)], Quota())
        kept = [torch.full((4,), 5.0, device=CUDA) for _ in range(32)]
        torch.cuda.synchronize()
        assert all(tensor.tolist() == [5.0] * 4 for tensor in kept)


@pytest.mark.parametrize("alone", [False, True])
def test_weights_change_in_place_and_by_pointer(lab: Any, alone: bool) -> None:
    if alone:
        lab.alone.add("affine")
    engine = lab.gpu_engine()
    program, (model,) = served(engine, lab, 1)
    for step in range(1, 6):
        with torch.no_grad():
            work(4)
            model.weight.fill_(float(step))
        y = engine.call(program, [*model.tensors(), lab.x(2.0, CUDA)], Quota())[0]
        model.weight.data = torch.full((4,), 100.0 + step, device=CUDA)
        z = engine.call(program, [*model.tensors(), lab.x(2.0, CUDA)], Quota())[0]
        assert (y[0].item(), z[0].item()) == (2.0 * step, 200.0 + 2 * step)


def test_a_request_under_way_keeps_the_weights_it_was_sent_with(lab: Any) -> None:
    engine = lab.gpu_engine()
    program, (model,) = served(engine, lab, 1)
    plan = lab.plans["affine"]
    engine.call(program, [*model.tensors(), lab.x(2.0, CUDA)], Quota())
    before = model.weight.detach().clone()
    busy = work()
    x = lab.x(2.0, CUDA) + busy[0, :4] * 0
    first = engine.call(program, [*model.tensors(), x], Quota())[0]
    model.weight.data = torch.full((4,), 50.0, device=CUDA)
    second = engine.call(program, [*model.tensors(), lab.x(2.0, CUDA)], Quota())[0]
    assert first.tolist() == (2 * before).tolist()
    assert second.tolist() == [100.0] * 4
    assert plan.storage.refreshes >= 1


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_outputs_are_what_eager_returns(lab: Any, inference: bool, alone: bool) -> None:
    if alone:
        lab.alone.add("affine")
    engine = lab.gpu_engine()
    program, (model,) = served(engine, lab, 1)
    with torch.inference_mode(inference), torch.no_grad():
        outputs = engine.call(program, [*model.tensors(), lab.x(1.0, CUDA)], Quota())
    assert [output.is_inference() for output in outputs] == [inference, inference]
    assert len({output.untyped_storage().data_ptr() for output in outputs}) == 2
    assert torch.equal(outputs[0], model.weight.detach())


def test_outputs_of_the_lanes_stream_are_not_used_again_too_early(lab: Any) -> None:
    lab.alone.add("affine")
    engine = lab.gpu_engine()
    program, (model,) = served(engine, lab, 1)
    results = []
    for _ in range(50):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            y = engine.call(program, [*model.tensors(), lab.x(2.0, CUDA)], Quota())[0]
            work(2)
            results.append(y + 0)
            del y
        engine.call(program, [*model.tensors(), lab.x(-7.0, CUDA)], Quota())
    torch.cuda.synchronize()
    assert [result.tolist() for result in results] == [(2 * model.weight).tolist()] * 50


class Watching(FairPolicy):
    """Notes the highest load that it was shown."""

    highest = 0

    def form(self, view: View, now: float, settings: Any) -> Any:
        self.highest = max([self.highest, *(lane.bundles for lane in view.lanes)])
        return super().form(view, now, settings)


@pytest.mark.parametrize("lanes", [1, 2])
def test_no_more_than_in_flight_bundles_are_enqueued_a_lane(lab: Any, lanes: int) -> None:
    engine = lab.gpu_engine(in_flight=2, max_bundle=1, lanes=lanes, capture=False)
    program, (model,) = served(engine, lab, 1)
    request = lab.submit(engine, program, model)
    watching = Watching()
    request.dispatcher._driver.policy = watching
    lab.plans["affine"].before = lambda inputs: work(10)
    requests = [lab.submit(engine, program, model, float(number)) for number in range(12)]
    engine.wait(requests)
    assert watching.highest == 2
    scale = model.weight[0].item()
    assert [r.result()[0][0].item() for r in requests] == pytest.approx([scale * n for n in range(12)])


def test_ends_are_seen_without_further_calls(lab: Any) -> None:
    engine = lab.gpu_engine()
    program, (model,) = served(engine, lab, 1)
    request = lab.submit(engine, program, model)
    done = threading.Event()
    request.add_done_callback(lambda ended: done.set())
    engine.kick()
    assert done.wait(10)
    assert request.inputs == ()
    blocking = lab.submit(engine, program, model)
    engine.wait([blocking])
    lab.until(blocking.done)
    assert engine.stats().device_seconds > 0.0
    assert engine.stats().tenants["default"].p50 < 1.0


def test_the_device_can_be_synchronised_while_sizes_are_captured(lab: Any) -> None:
    engine = lab.gpu_engine()
    program, models = served(engine, lab, 16)
    stop, errors = threading.Event(), []

    def synchronize() -> None:
        try:
            while not stop.is_set():
                torch.cuda.synchronize()
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=synchronize)
    thread.start()
    for size in range(1, 17):
        bundle(engine, lab, program, models[:size])
    assert engine.quiesce(60)
    stop.set()
    thread.join()
    assert engine.plans()[0].capture_failures == ()
    assert errors == []


def test_only_the_guilty_request_fails(lab: Any) -> None:
    engine = lab.gpu_engine(capture=False)
    program, (model,) = served(engine, lab, 1)

    def poisoned(inputs: list[Tensor]) -> None:
        if bool((inputs[0] == 13.0).any()):
            raise ValueError("thirteen")

    lab.plans["affine"].before = poisoned
    requests = [lab.submit(engine, program, model, value) for value in (1.0, 13.0, 3.0)]
    engine.wait(requests)
    scale = model.weight[0].item()
    assert requests[0].result()[0][0].item() == scale
    assert requests[2].result()[0][0].item() == pytest.approx(3 * scale)
    assert isinstance(requests[1].error.__cause__, ValueError)


def test_device_memory_does_not_grow(lab: Any) -> None:
    engine = lab.gpu_engine()
    program, models = served(engine, lab, 4)

    def churn(rounds: int) -> None:
        for _ in range(rounds):
            bundle(engine, lab, program, models)
            fresh = lab.Affine(2.0, CUDA)
            bundle(engine, lab, program, [fresh])
            del fresh
        torch.cuda.synchronize()
        lab.until(lambda: lab.plans["affine"].storage.bound <= 4)
        lab.until(lambda: not engine.instance(program, models[0].tensors()).uses)
        gc.collect()

    churn(20)
    assert engine.quiesce(60)
    churn(20)
    before = torch.cuda.memory_allocated()
    churn(200)
    assert torch.cuda.memory_allocated() <= before


def test_events_are_used_again(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    original = lanes.new_event

    def counting(timing: bool = False) -> Any:
        made.append(original(timing))
        return made[-1]

    monkeypatch.setattr(lanes, "new_event", counting)
    engine = lab.gpu_engine()
    program, models = served(engine, lab, 2)
    for _ in range(20):
        bundle(engine, lab, program, models)
    torch.cuda.synchronize()
    few = len(made)
    for _ in range(200):
        bundle(engine, lab, program, models)
    assert len(made) <= few + 4

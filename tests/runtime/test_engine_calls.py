"""Calls through the engine: answers, coalescing, outputs, errors."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_mux.errors import CancelledRequest, ClosedError, DeviceFailed, DeviceMismatch, ExecutionFailed
from torch_mux.runtime.request import RequestState
from torch_mux.types import Quota


def test_a_call_answers_and_compiles_once(lab: Any) -> None:
    engine, program = lab.engine(), lab.program()
    models = [lab.Affine(scale) for scale in (1.0, 2.0, 3.0)]
    for model in models:
        assert torch.equal(lab.call(engine, program, model, 2.0), 2.0 * model.weight)
    assert lab.compiled == ["affine"]
    assert engine.plans()[0].instances == 3


def test_equal_fingerprints_share_the_first_program(lab: Any) -> None:
    engine = lab.engine()
    first, second = lab.program(), lab.program()
    assert engine.register(first) is first
    assert engine.register(second) is first


def test_submitted_together_goes_out_together(lab: Any) -> None:
    engine, program = lab.engine(), lab.program()
    models = [lab.Affine(float(scale)) for scale in range(5)]
    calls = [(engine.instance(program, m.tensors()), [lab.x(3.0)], Quota()) for m in models]
    requests = engine.submit_all(calls)
    engine.wait(requests)
    assert [request.result()[0].tolist() for request in requests] == [[3.0 * s] * 4 for s in range(5)]
    assert lab.plans["affine"].bundles == [5]
    assert engine.stats().sizes == {5: 1}


def test_a_device_that_failed_leaves_nothing_of_another_queued(lab: Any) -> None:
    engine, program, elsewhere = lab.engine(), lab.program(), lab.engine()
    models = [lab.Affine(2.0), lab.Affine(3.0)]
    here = engine.instance(program, models[0].tensors())
    broken = elsewhere.instance(lab.program(), models[1].tensors())
    broken.served.dispatcher.executor.fault = RuntimeError("an illegal access")
    with pytest.raises(DeviceFailed, match="illegal access"):
        engine.submit_all([(one, [lab.x(1.0)], Quota()) for one in (here, broken)], kick=True)
    broken.served.dispatcher.executor.fault, broken.served.dispatcher.closed = None, True
    with pytest.raises(ClosedError):
        engine.submit_all([(one, [lab.x(1.0)], Quota()) for one in (here, broken)], kick=True)
    tenant = engine.stats().tenants["default"]
    assert (tenant.pending, tenant.ok) == (0, 0)
    (request,) = engine.submit_all([(here, [lab.x(1.0)], Quota())])
    engine.wait([request])
    assert request.result()[0][0].item() == 2.0
    assert engine.stats().sizes == {1: 1}


def test_one_instance_may_hold_several_slots(lab: Any) -> None:
    engine, program = lab.engine(), lab.program()
    model = lab.Affine(2.0)
    requests = [lab.submit(engine, program, model, float(value)) for value in range(4)]
    engine.wait(requests)
    assert [request.result()[0][0].item() for request in requests] == [0.0, 2.0, 4.0, 6.0]
    assert lab.plans["affine"].bundles == [4]
    assert lab.plans["affine"].storage.bound == 1


def test_threads_coalesce(lab: Any) -> None:
    engine, program = lab.engine(), lab.program()
    models = [lab.Affine(float(scale)) for scale in range(8)]
    lab.call(engine, program, models[0])
    plan = lab.plans["affine"]
    entered, gate = threading.Event(), threading.Event()

    def hold(inputs: list[Tensor]) -> None:
        entered.set()
        assert gate.wait(10)

    plan.before = hold
    answers: dict[int, Tensor] = {}

    def client(index: int) -> None:
        answers[index] = lab.call(engine, program, models[index], 5.0)

    first = threading.Thread(target=client, args=(0,))
    first.start()
    assert entered.wait(10)
    others = [threading.Thread(target=client, args=(index,)) for index in range(1, 8)]
    for thread in others:
        thread.start()
    lab.until(lambda: engine.stats().tenants["default"].pending == 8)
    gate.set()
    for thread in [first, *others]:
        thread.join(10)
    assert {index: answer[0].item() for index, answer in answers.items()} == {i: 5.0 * i for i in range(8)}
    assert plan.bundles == [1, 1, 7]


def test_closed_loop_clients_stay_in_one_cohort(lab: Any) -> None:
    engine, program = lab.engine(linger=0.5), lab.program()
    models = [lab.Affine(float(scale)) for scale in range(4)]
    for model in models:
        lab.call(engine, program, model)
    plan = lab.plans["affine"]
    plan.before = lambda inputs: threading.Event().wait(0.02)
    plan.bundles.clear()
    start = threading.Barrier(4)

    def client(index: int) -> None:
        start.wait()
        for _ in range(12):
            assert lab.call(engine, program, models[index], 2.0)[0].item() == 2.0 * index

    threads = [threading.Thread(target=client, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sum(plan.bundles) == 48
    assert plan.bundles.count(4) >= 8


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_outputs_are_what_eager_returns(lab: Any, inference: bool, alone: bool) -> None:
    if alone:
        lab.alone.add("affine")
    engine, program, model = lab.engine(), lab.program(), lab.Affine(2.0)
    with torch.inference_mode(inference), torch.no_grad():
        outputs = engine.call(program, [*model.tensors(), lab.x()], Quota())
    assert [output.is_inference() for output in outputs] == [inference, inference]
    assert [output.requires_grad for output in outputs] == [False, False]
    assert outputs[0].stride() == (1,)


def test_the_dispatching_callers_modes_do_not_reach_others(lab: Any) -> None:
    lab.alone.add("affine")
    engine, program, model = lab.engine(), lab.program(), lab.Affine(2.0)
    with torch.inference_mode():
        inferring = lab.submit(engine, program, model)
    plain = lab.submit(engine, program, model)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        engine.wait([inferring, plain])
    assert inferring.result()[0].is_inference()
    assert not plain.result()[0].is_inference()
    assert plain.result()[0].dtype == torch.float32


def test_every_output_has_its_own_storage(lab: Any) -> None:
    engine, program, model = lab.engine(), lab.program(), lab.Affine()
    requests = [lab.submit(engine, program, model, float(value)) for value in range(3)]
    engine.wait(requests)
    outputs = [output for request in requests for output in request.result()]
    assert len({output.untyped_storage().data_ptr() for output in outputs}) == 6
    assert {output.untyped_storage().nbytes() for output in outputs} == {16}
    outputs[0].fill_(99)
    assert [output[0].item() for output in outputs[1:]] == [0.0, 1.0, 2.0, 2.0, 4.0]


def test_outputs_that_are_no_tensors_stay_in_place(lab: Any) -> None:
    engine, program, model = lab.engine(), lab.program("holes"), lab.Affine(3.0)
    first, hole, last = engine.call(program, [*model.tensors(), lab.x(2.0)], Quota())
    assert hole is None
    assert (first[0].item(), last[0].item()) == (6.0, 4.0)


def test_a_program_without_parameters_has_one_instance(lab: Any) -> None:
    engine, program = lab.engine(), lab.program("bare", parameters=0)
    assert engine.instance(program, []) is engine.instance(program, [])
    assert engine.call(program, [lab.x(2.0)], Quota())[1][0].item() == 4.0


def test_only_the_guilty_request_fails(lab: Any) -> None:
    engine, program, model = lab.engine(), lab.program(), lab.Affine(2.0)
    lab.call(engine, program, model)

    def poisoned(inputs: list[Tensor]) -> None:
        if bool((inputs[0] == 13.0).any()):
            raise ValueError("thirteen")

    plan = lab.plans["affine"]
    plan.before = poisoned
    plan.bundles.clear()
    requests = [lab.submit(engine, program, model, value) for value in (1.0, 13.0, 3.0)]
    engine.wait(requests)
    assert requests[0].result()[0][0].item() == 2.0
    assert requests[2].result()[0][0].item() == 6.0
    with pytest.raises(ExecutionFailed, match=r"affine failed while it ran: ValueError: thirteen") as caught:
        requests[1].result()
    assert isinstance(caught.value.__cause__, ValueError)
    assert plan.bundles == [3, 1, 1, 1]
    assert lab.call(engine, program, model, 4.0)[0].item() == 8.0
    tenant = engine.stats().tenants["default"]
    assert (tenant.ok, tenant.errors) == (4, 1)


def test_an_exception_alone_is_only_that_callers(lab: Any) -> None:
    lab.alone.add("affine")
    engine, program, model = lab.engine(), lab.program(), lab.Affine(2.0)
    lab.call(engine, program, model)

    def poisoned(inputs: list[Tensor]) -> None:
        if inputs[0][0] == 13.0:
            raise ValueError("thirteen")

    lab.plans["affine"].before = poisoned
    good, bad = lab.submit(engine, program, model), lab.submit(engine, program, model, 13.0)
    engine.wait([good, bad])
    assert good.result()[0][0].item() == 2.0
    assert bad.state is RequestState.ERROR
    with pytest.raises(ExecutionFailed):
        bad.result()


def test_a_kept_error_keeps_no_bundle_alive(lab: Any) -> None:
    engine, program, model = lab.engine(), lab.program(), lab.Affine()
    lab.call(engine, program, model)

    def raising(inputs: list[Tensor]) -> None:
        raise ValueError("no")

    lab.plans["affine"].before = raising
    request = lab.submit(engine, program, model)
    with pytest.raises(ExecutionFailed) as caught:
        request.result()
    cause = caught.value.__cause__
    assert cause is not None
    traceback = cause.__traceback__
    assert traceback is not None
    assert traceback.tb_frame.f_code.co_name == "run"


def test_inputs_on_another_device_are_refused_by_index(lab: Any) -> None:
    engine, program, model = lab.engine(), lab.program(), lab.Affine()
    instance = engine.instance(program, model.tensors())
    with pytest.raises(DeviceMismatch, match=r"input 0 of affine is on meta but its weights are on cpu"):
        engine.submit(instance, [torch.empty(4, device="meta")], Quota())
    assert "default" not in engine.stats().tenants


def test_cancel_works_only_while_queued(lab: Any) -> None:
    engine, program, model = lab.engine(), lab.program(), lab.Affine()
    first, second = lab.submit(engine, program, model), lab.submit(engine, program, model)
    assert first.cancel()
    assert not first.cancel()
    assert first.done()
    assert first.state is RequestState.CANCELLED
    with pytest.raises(CancelledRequest, match="default"):
        first.result()
    second.result()
    assert not second.cancel()
    assert lab.plans["affine"].bundles == [1]
    assert engine.stats().tenants["default"].cancelled == 1


def test_done_callbacks_come_once_and_at_once_when_late(lab: Any) -> None:
    engine, program, model = lab.engine(), lab.program(), lab.Affine()
    request = lab.submit(engine, program, model)
    seen: list[str] = []
    request.add_done_callback(lambda done: seen.append(f"early {done.state.value}"))
    request.add_done_callback(lambda done: 1 / 0)
    request.result()
    request.add_done_callback(lambda done: seen.append("late"))
    assert seen == ["early done", "late"]


def test_a_callback_may_call_a_model(lab: Any) -> None:
    engine, program, model = lab.engine(), lab.program(), lab.Affine(2.0)
    answers: list[float] = []
    request = lab.submit(engine, program, model)
    request.add_done_callback(lambda done: answers.append(lab.call(engine, program, model, 7.0)[0].item()))
    request.result()
    assert answers == [14.0]


def test_kick_serves_requests_that_nobody_waits_for(lab: Any) -> None:
    engine, program, model = lab.engine(), lab.program(), lab.Affine(2.0)
    done = threading.Event()
    requests = [lab.submit(engine, program, model, float(value)) for value in range(3)]
    requests[-1].add_done_callback(lambda request: done.set())
    engine.kick()
    assert done.wait(10)
    assert [request.result()[0][0].item() for request in requests] == [0.0, 2.0, 4.0]
    assert set(lab.plans["affine"].threads).isdisjoint({threading.get_ident()})


def test_the_cap_is_the_sum_of_distinct_tenants(lab: Any) -> None:
    class Wide:
        def __call__(self, engine: Any, device: torch.device) -> Any:
            from torch_mux.runtime.executors.cpu import CpuExecutor

            executor = CpuExecutor(device, lab.stack)
            executor.sms = 132
            return executor

    engine, program, model = lab.engine(executor=Wide()), lab.program(), lab.Affine()
    quotas = [Quota("a", sms=0.25), Quota("a", sms=0.25), Quota("b", sms=0.3)]
    engine.wait([lab.submit(engine, program, model, quota=quota) for quota in quotas])
    engine.wait([lab.submit(engine, program, model, quota=Quota("c", sms=0.001))])
    engine.wait([lab.submit(engine, program, model, quota=Quota(n, sms=0.7)) for n in "de"])
    assert lab.plans["affine"].controls == [[3, 73], [1, 1], [2, 132]]


def test_closing_refuses_and_reset_serves_again(lab: Any) -> None:
    engine, program, model = lab.engine(), lab.program(), lab.Affine(2.0)
    old = engine.instance(program, model.tensors())
    lab.call(engine, program, model)
    engine.close()
    engine.close()
    with pytest.raises(ClosedError):
        lab.call(engine, program, model)
    with pytest.raises(ClosedError):
        engine.submit(old, [lab.x()], Quota())
    engine.reset()
    assert engine.stats().requests == 0
    assert lab.call(engine, program, model, 3.0)[0].item() == 6.0
    assert engine.submit(old, [lab.x(4.0)], Quota()).result()[0][0].item() == 8.0
    assert lab.compiled == ["affine", "affine"]


def test_closing_serves_what_is_pending(lab: Any) -> None:
    engine, program, model = lab.engine(), lab.program(), lab.Affine(2.0)
    lab.call(engine, program, model)
    request = lab.submit(engine, program, model, 3.0)
    engine.close()
    assert request.result()[0][0].item() == 6.0

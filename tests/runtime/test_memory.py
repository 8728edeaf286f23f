"""What tenants hold, what they are refused, and allocations that fail."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_mux import compat
from torch_mux.errors import ClosedError, DeviceMismatch, ExecutionFailed, MemoryQuotaExceeded
from torch_mux.runtime import memory as memory_module
from torch_mux.runtime.lanes import Lane
from torch_mux.types import Quota

WEIGHTS, PREPARED, OUTPUTS = 2 * 4 * 4, 2 * 4 * 4, 2 * 4 * 4
BUFFERS = 4 * 4


def held(engine: Any, tenant: str) -> int:
    found = engine.stats().tenants.get(tenant)
    return 0 if found is None else found.held


@pytest.fixture
def ready(lab: Any) -> tuple[Any, Any]:
    engine, program = lab.engine(), lab.program()
    engine.register(program)
    assert engine.quiesce(10)
    return engine, program


def test_weights_copies_outputs_and_buffers_are_counted(lab: Any, ready: Any) -> None:
    engine, program = ready
    model = lab.Affine()
    request = lab.submit(engine, program, model, quota=Quota("alice"))
    assert held(engine, "alice") == WEIGHTS + PREPARED + OUTPUTS
    request.result()
    assert held(engine, "alice") == WEIGHTS + PREPARED + BUFFERS
    other = lab.Affine()
    lab.submit(engine, program, other, quota=Quota("alice")).result()
    assert held(engine, "alice") == 2 * (WEIGHTS + PREPARED) + BUFFERS


def test_what_two_tenants_use_is_divided(lab: Any, ready: Any) -> None:
    engine, program = ready
    model = lab.Affine()
    for name in ("alice", "bob"):
        lab.submit(engine, program, model, quota=Quota(name)).result()
    assert held(engine, "alice") == held(engine, "bob") == (WEIGHTS + PREPARED + BUFFERS) // 2


def test_weights_under_two_programs_count_once(lab: Any, ready: Any) -> None:
    engine, program = ready
    model, second = lab.Affine(), lab.program("second")
    engine.register(second)
    assert engine.quiesce(10)
    for each in (program, second):
        lab.submit(engine, each, model, quota=Quota("alice")).result()
    assert held(engine, "alice") == WEIGHTS + 2 * (PREPARED + BUFFERS)


def test_a_request_above_the_quota_is_refused_and_costs_nothing(lab: Any, ready: Any) -> None:
    engine, program = ready
    one, other = lab.Affine(2.0), lab.Affine(3.0)
    limit = WEIGHTS + PREPARED + BUFFERS + OUTPUTS
    quota = Quota("alice", memory=limit)
    assert lab.submit(engine, program, one, quota=quota).result()[0][0].item() == 2.0
    with pytest.raises(MemoryQuotaExceeded) as caught:
        lab.submit(engine, program, other, quota=quota)
    message = str(caught.value)
    for part in ("'alice'", str(limit - OUTPUTS), str(WEIGHTS + PREPARED + OUTPUTS), f"memory={limit}"):
        assert part in message
    assert held(engine, "alice") == limit - OUTPUTS
    assert lab.plans["affine"].storage.bound == 1
    assert lab.submit(engine, program, one, quota=quota).result()[0][0].item() == 2.0
    assert lab.submit(engine, program, other, quota=Quota("bob")).result()[0][0].item() == 3.0


@pytest.mark.parametrize("how", ["remove", "collect"])
def test_removing_and_collecting_give_it_back(lab: Any, ready: Any, how: str) -> None:
    engine, program = ready
    one, other = lab.Affine(2.0), lab.Affine(3.0)
    quota = Quota("alice", memory=WEIGHTS + PREPARED + BUFFERS + OUTPUTS)
    lab.submit(engine, program, one, quota=quota).result()
    if how == "remove":
        engine.remove(one.tensors())
    else:
        del one
        gc.collect()
    lab.until(lambda: held(engine, "alice") <= BUFFERS)
    assert lab.submit(engine, program, other, quota=quota).result()[0][0].item() == 3.0


def test_outputs_under_way_count_until_they_are_their_callers(lab: Any, ready: Any) -> None:
    engine, program = ready
    model = lab.Affine()
    lab.call(engine, program, model)
    quota = Quota("alice", memory=WEIGHTS + PREPARED + BUFFERS + 2 * OUTPUTS)
    two = [lab.submit(engine, program, model, quota=quota) for _ in range(2)]
    extra = Quota("alice", memory=held(engine, "alice"))
    with pytest.raises(MemoryQuotaExceeded):
        lab.submit(engine, program, model, quota=extra)
    two[0].cancel()
    third = lab.submit(engine, program, model, quota=extra)
    engine.wait([*two, third])
    assert engine._memory._flying == {}


def test_requests_of_one_round_count_together_and_none_is_queued(lab: Any, ready: Any) -> None:
    engine, program = ready
    model = lab.Affine()
    lab.submit(engine, program, model, quota=Quota("alice")).result()
    quota = Quota("alice", memory=held(engine, "alice") + 2 * OUTPUTS)
    instance = engine.instance(program, model.tensors())
    calls = [(instance, [lab.x()], quota)] * 3
    with pytest.raises(MemoryQuotaExceeded):
        engine.submit_all(calls)
    assert engine.stats().tenants["alice"].pending == 0
    engine.wait(engine.submit_all(calls[:2]))
    assert engine._memory._flying == {}


def test_a_plan_that_was_not_there_is_checked_before_anything_is_prepared(lab: Any) -> None:
    lab.slow["slow"] = threading.Event()
    engine, program = lab.engine(), lab.program("slow")
    poor, rich = lab.Affine(2.0), lab.Affine(3.0)
    refused = lab.submit(engine, program, poor, quota=Quota("alice", memory=WEIGHTS + OUTPUTS))
    served = lab.submit(engine, program, rich, quota=Quota("bob", memory=1 << 20))
    lab.slow["slow"].set()
    engine.wait([refused, served])
    assert served.result()[0][0].item() == 3.0
    with pytest.raises(MemoryQuotaExceeded, match="alice"):
        refused.result()
    assert lab.plans["slow"].storage.bound == 1


def test_what_is_not_queued_after_all_is_not_counted(lab: Any, ready: Any) -> None:
    engine, program = ready
    model = lab.Affine()
    instance = engine.instance(program, model.tensors())
    with pytest.raises(DeviceMismatch):
        engine.submit_all(
            [(instance, [lab.x()], Quota()), (instance, [torch.empty(4, device="meta")], Quota())]
        )
    engine._dispatchers[torch.device("cpu")].closed = True
    with pytest.raises(ClosedError):
        engine.submit_all([(instance, [lab.x()], Quota())])
    assert engine._memory._flying == {}


def cuda_error() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory")


def cpu_error() -> Exception:
    return RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize("kind", [cuda_error, cpu_error])
def test_memory_that_is_short_once_is_waited_for(lab: Any, ready: Any, kind: Callable[[], Exception]) -> None:
    engine, program = ready
    faults = [kind()]

    def fail(inputs: list[Tensor]) -> None:
        if faults:
            raise faults.pop()

    lab.plans["affine"].before = fail
    models = [lab.Affine(scale) for scale in (1.0, 2.0)]
    requests = [lab.submit(engine, program, model) for model in models]
    engine.wait(requests)
    assert [request.result()[0][0].item() for request in requests] == [1.0, 2.0]
    assert lab.plans["affine"].bundles == [2, 2]


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("kind", [cuda_error, cpu_error])
def test_memory_that_stays_short_is_one_requests_error(
    lab: Any, kind: Callable[[], Exception], alone: bool
) -> None:
    if alone:
        lab.alone.add("affine")
    engine, program = lab.engine(), lab.program()
    engine.register(program)
    assert engine.quiesce(10)

    def fail(inputs: list[Tensor]) -> None:
        if bool((inputs[0] == 13.0).any()):
            raise kind()

    lab.plans["affine"].before = fail
    model = lab.Affine(2.0)
    good = [lab.submit(engine, program, model, value) for value in (1.0, 2.0)]
    bad = lab.submit(engine, program, model, 13.0)
    engine.wait([*good, bad])
    assert [request.result()[0][0].item() for request in good] == [2.0, 4.0]
    with pytest.raises(ExecutionFailed, match="memory") as caught:
        bad.result()
    assert type(caught.value.__cause__) is type(kind())
    assert engine.stats().tenants["default"].errors == 1


def test_outputs_that_find_no_memory(lab: Any, ready: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, program = ready
    model = lab.Affine(2.0)
    served = engine.instance(program, model.tensors()).served
    faults = [cuda_error()]
    real = served.empty_outputs

    def empty(*given: Any) -> list[object]:
        if faults:
            raise faults.pop()
        return real(*given)  # type: ignore[no-any-return]

    monkeypatch.setattr(served, "empty_outputs", empty)
    assert lab.call(engine, program, model)[0].item() == 2.0
    faults += [cuda_error(), cuda_error()]
    with pytest.raises(ExecutionFailed, match="CUDA out of memory"):
        lab.submit(engine, program, model)
    assert engine._memory._flying == {}
    assert lab.call(engine, program, model)[0].item() == 2.0


def test_the_pool_of_a_lanes_graphs_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {(0, 0): [{"total_size": 100}], (0, 3): [{"total_size": 7}] * 2}
    monkeypatch.setattr(torch.cuda, "memory_snapshot", parts.__getitem__)
    lane: Any = object.__new__(Lane)
    lane.pool = object.__new__(compat.Pool)
    lane.pool.key = (0, 3)
    lane.measure_pool()
    assert lane.pool_bytes == 14


def test_weights_without_a_storage_are_counted_too(lab: Any, ready: Any) -> None:
    engine, _ = ready
    program = lab.program("sparse", parameters=1)
    engine.register(program)
    sparse = torch.eye(4).to_sparse()
    instance = engine.instance(program, [sparse])
    engine._memory.reserve([(instance, (), Quota("alice"))])
    assert engine._memory.held("alice") >= 4 * 4 * 4 + OUTPUTS
    engine._memory.cancel([(instance, Quota("alice"))])


def test_who_used_a_model_is_remembered_up_to_a_number(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "_MOST", 8)
    engine, program, model = lab.engine(), lab.program(), lab.Affine()
    for number in range(20):
        lab.submit(engine, program, model, quota=Quota(f"t{number}")).result()
    instance = engine.instance(program, model.tensors())
    assert len(instance.tenants) <= 8 and "t19" in instance.tenants
    lab.submit(engine, program, model, quota=Quota("t0")).result()
    held = {name: one.held for name, one in engine.stats().tenants.items()}
    assert held["t0"] == held["t19"] > 0 and held["t1"] == 0

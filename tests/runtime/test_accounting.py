"""Device time divided among the slots of a bundle."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_mux.errors import ExecutionFailed
from torch_mux.runtime import accounting as accounting_module
from torch_mux.runtime.accounting import OTHERS, Accounting
from torch_mux.runtime.rates import Rates
from torch_mux.runtime.shares import PICOSECONDS, divided
from torch_mux.types import Quota


@dataclass
class Slot:
    """What accounting reads of a request."""

    quota: Quota
    work: int = 1
    arrival: float = 0.0
    started: float = field(default=0.0)
    served: Any = field(default_factory=lambda: SimpleNamespace(program=SimpleNamespace(name="net")))


def bundle(*slots: tuple[str, int]) -> Any:
    return [Slot(Quota(tenant), work) for tenant, work in slots]


@given(total=st.integers(0, 10**16), works=st.lists(st.integers(1, 10**12), min_size=1, max_size=64))
def test_parts_are_in_proportion_and_add_up(total: int, works: list[int]) -> None:
    parts = divided(total, works)
    assert sum(parts) == total
    for part, work in zip(parts, works, strict=True):
        assert abs(part * sum(works) - total * work) < sum(works)


@given(
    st.lists(
        st.tuples(
            st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 10**10)), min_size=1, max_size=9),
            st.floats(0.0, 100.0),
        ),
        max_size=30,
    )
)
def test_the_sum_over_tenants_is_the_bundles_time_exactly(
    bundles: list[tuple[list[tuple[str, int]], float]],
) -> None:
    accounting = Accounting()
    for slots, seconds in bundles:
        accounting.ran(bundle(*slots), seconds, True)
    assert sum(tenant.device_time for tenant in accounting._tenants.values()) == accounting._device_time
    assert accounting._device_time == sum(round(seconds * PICOSECONDS) for _, seconds in bundles)


def test_ragged_slots_count_by_their_work() -> None:
    accounting = Accounting()
    accounting.ran(bundle(("small", 1), ("large", 3), ("small", 1)), 1e-3, True)
    tenants = accounting.snapshot().tenants
    assert tenants["small"].device_seconds == pytest.approx(4e-4)
    assert tenants["large"].device_seconds == pytest.approx(6e-4)


def test_a_request_costs_what_its_plan_says(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_plan = lab.compile_plan

    def heavy(program: Any, settings: Any) -> Any:
        plan = compile_plan(program, settings)
        plan.work = 7
        return plan

    monkeypatch.setattr(lab, "compile_plan", heavy)
    engine = lab.engine()
    request = lab.submit(engine, lab.program(), lab.Affine())
    request.result()
    assert request.work == 7


def test_tenants_without_end_are_counted_as_one_in_the_end(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting_module, "_MOST", 64)
    engine, program, model = lab.engine(), lab.program(), lab.Affine()
    engine.register(program)
    assert engine.quiesce(10)
    accounting = engine._accounting
    pending = [Quota(f"pending{number}") for number in range(3)]
    accounting.accepted(pending)
    for number in range(900):
        lab.submit(engine, program, model, quota=Quota(f"t{number}")).result()
        if number % 10 == 0:
            lab.submit(engine, program, model, quota=Quota("regular")).result()
    found = engine.stats()
    assert len(found.tenants) <= 80
    assert OTHERS in found.tenants and "t899" in found.tenants and "t0" not in found.tenants
    assert found.tenants["regular"].accepted == 90
    assert all(found.tenants[quota.tenant].pending == 1 for quota in pending)
    assert sum(one.accepted for one in found.tenants.values()) == 993
    assert sum(one.ok for one in found.tenants.values()) == 990
    whole = sum(one.device_seconds for one in found.tenants.values())
    assert whole == pytest.approx(found.device_seconds, abs=1e-9)


def test_buckets_that_are_full_are_forgotten_and_others_are_not() -> None:
    rates = Rates()
    slow = Quota("slow", rate=0.001, burst=1)
    rates.take(slow, 0.0)
    for number in range(5000):
        rates.take(Quota(f"t{number}", rate=100.0, burst=1), 0.01 * number)
    assert len(rates._buckets) <= 1024
    assert rates.wait(slow, 50.0) == pytest.approx(950.0)


def test_a_failed_request_holds_no_outputs(lab: Any) -> None:
    engine, program, model = lab.engine(), lab.program(), lab.Affine()
    lab.call(engine, program, model)

    def fail(inputs: list[torch.Tensor]) -> None:
        raise ValueError("broken")

    lab.plans["affine"].before = fail
    request = lab.submit(engine, program, model)
    outputs = [weakref.ref(output) for output in request.outputs]
    gc.disable()
    try:
        with pytest.raises(ExecutionFailed) as caught:
            request.result()
        assert all(output() is None for output in outputs)
    finally:
        gc.enable()
    assert request.error is not None and str(caught.value) == str(request.error)
    assert caught.value.__cause__ is request.error.__cause__  # a copy: what is kept keeps no frames

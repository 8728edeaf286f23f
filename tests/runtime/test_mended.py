"""Defects that were mended once: each of these failed before."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from clocks import Told

from torch_mux.errors import ExecutionFailed, MemoryQuotaExceeded
from torch_mux.runtime.forecasts import Forecasts
from torch_mux.runtime.tally import TenantTally
from torch_mux.types import FallbackKind, Quota

CPU = torch.device("cpu")


def test_a_deadline_is_refused_only_for_what_is_ahead_in_its_own_queue(lab: Any) -> None:
    """Others' requests, and the tenant's own to another model, are not ahead of it."""
    engine, fast, model = lab.engine(Told(), max_bundle=1), lab.program(), lab.Affine()
    lab.call(engine, fast, model)
    lab.slow["slow"] = threading.Event()
    elsewhere = [lab.submit(engine, lab.program("slow"), model, quota=Quota("a")) for _ in range(60)]
    for _ in range(4):
        lab.call(engine, fast, model)
    policy = elsewhere[0].dispatcher.policy
    for _ in range(40):
        policy.predictor.observe(fast.fingerprint, 1, (16, 0), 0.05)
    others = [lab.submit(engine, fast, model, quota=Quota("b")) for _ in range(60)]
    mine = lab.submit(engine, fast, model, quota=Quota("a", deadline=1.0))
    mine.result()
    lab.slow["slow"].set()
    engine.wait([*elsewhere, *others])


def test_counting_goes_on_while_latencies_are_sorted(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, program, model = lab.engine(), lab.program(), lab.Affine(2.0)
    lab.call(engine, program, model)
    accounting, real, free = engine._accounting, TenantTally.snapshot, []

    def slow(self: TenantTally, name: str, held: int) -> Any:
        free.append(accounting._lock.acquire(blocking=False))
        if free[-1]:
            accounting._lock.release()
        return real(self, name, held)

    monkeypatch.setattr(TenantTally, "snapshot", slow)
    assert engine.stats().tenants["default"].ok == 1
    assert free == [True]


def test_programs_that_were_used_last_are_kept_on_disk(tmp_path: Path) -> None:
    """One that is measured again counts as used last, also when it was on disk already."""
    for keys in ([f"p{number}" for number in range(64)], ["p0"], ["new"]):
        forecasts = Forecasts(tmp_path)
        predictor = forecasts.predictor(CPU)
        for key in keys:
            predictor.observe(key, 1, (16, 0), 1e-3)
        forecasts.close()
    kept = list(json.loads(next(tmp_path.glob("*.json")).read_text())["programs"])
    assert kept[-2:] == ["p0", "new"] and "p1" not in kept and len(kept) == 64


def test_only_the_next_alarm_wakes_the_service_thread(lab: Any) -> None:
    engine, program, model = lab.engine(), lab.program("slow"), lab.Affine()
    lab.slow["slow"] = threading.Event()
    first = lab.submit(engine, program, model, quota=Quota("a", deadline=100.0))
    pokes: list[float] = []
    first.dispatcher.service.poke = lambda: pokes.append(time.perf_counter())
    for _ in range(20):
        lab.submit(engine, program, model, quota=Quota("a", deadline=200.0))
    assert pokes == []
    lab.submit(engine, program, model, quota=Quota("a", deadline=50.0))
    assert len(pokes) == 1
    lab.slow["slow"].set()


class Clock:
    """Goes on by itself, and further when it is told to."""

    def __init__(self) -> None:
        self.skipped = 0.0

    def __call__(self) -> float:
        return time.perf_counter() + self.skipped


def retired(lab: Any, **settings: Any) -> tuple[Any, Any, Clock]:
    """An engine with a program whose plan raises, about to be retired, and the engine's clock."""
    clock = Clock()
    engine, program = lab.engine(clock=clock, quarantine=0, **settings), lab.program()
    engine.register(program)
    assert engine.quiesce(10)

    def fail(inputs: list[torch.Tensor]) -> None:
        raise ValueError("the plan is broken")

    lab.plans["affine"].before = fail
    return engine, program, clock


def raises(lab: Any, engine: Any, program: Any, model: Any, times: int) -> None:
    for _ in range(times):
        with pytest.raises(ExecutionFailed, match="the plan is broken"):
            lab.call(engine, program, model)
    assert engine.quiesce(10)


def test_a_fall_back_plan_that_did_not_compile_is_made_again_later(lab: Any) -> None:
    engine, program, clock = retired(lab)
    model = lab.Affine(2.0)
    lab.broken.add("affine")
    raises(lab, engine, program, model, 8)
    raises(lab, engine, program, model, 1)
    (report,) = engine.plans()
    assert report.coalesced is True, "there is nothing else to run on"
    assert [reason.kind for reason in report.reasons] == [FallbackKind.COMPILE_FAILED]
    assert "no code for affine" in report.reasons[0].detail and "10 s" in report.reasons[0].detail
    clock.skipped += 11.0
    raises(lab, engine, program, model, 1)
    raises(lab, engine, program, model, 1)
    assert "20 s" in engine.plans()[0].reasons[0].detail, "it failed again"
    lab.broken.clear()
    clock.skipped += 11.0
    raises(lab, engine, program, model, 1)
    assert "20 s" in engine.plans()[0].reasons[0].detail, "too early"
    clock.skipped += 11.0
    raises(lab, engine, program, model, 1)
    assert lab.call(engine, program, model, 3.0)[0].item() == 6.0
    assert [reason.kind for reason in engine.plans()[0].reasons] == [FallbackKind.RETIRED]


def test_a_plan_that_recovers_before_there_is_another_is_not_retired(lab: Any) -> None:
    engine, program, clock = retired(lab)
    model = lab.Affine(2.0)
    lab.broken.add("affine")
    raises(lab, engine, program, model, 8)
    raises(lab, engine, program, model, 1)
    lab.plans["affine"].before = lambda inputs: None
    for _ in range(8):
        assert lab.call(engine, program, model, 3.0)[0].item() == 6.0
    lab.broken.clear()
    clock.skipped += 100.0
    assert lab.call(engine, program, model, 3.0)[0].item() == 6.0
    assert engine.quiesce(10)
    assert lab.call(engine, program, model, 3.0)[0].item() == 6.0
    (report,) = engine.plans()
    assert (report.coalesced, report.reasons, report.changes) == (True, (), ())


def test_a_tenant_does_not_pay_for_copies_that_a_retired_plan_does_not_make(lab: Any) -> None:
    """Of a model that came while the plan rests nothing is prepared; when it is, that is checked."""
    engine, program, clock = retired(lab)
    raises(lab, engine, program, lab.Affine(2.0), 8)
    assert lab.call(engine, program, lab.Affine(2.0), 3.0)[0].item() == 6.0
    # Weights, the outputs of one request and a part of the buffers, but no prepared copies of the weights.
    limit = Quota("small", memory=32 + 32 + 31)
    model = lab.Affine(5.0)
    for _ in range(3):
        assert lab.submit(engine, program, model, 3.0, quota=limit).result()[0][0].item() == 15.0
    lab.plans["affine"].before = lambda inputs: None
    clock.skipped += 11.0
    try:  # the first may be queued while the plan still rests
        request = lab.submit(engine, program, model, 3.0, quota=limit)
    except MemoryQuotaExceeded:
        request = None
    if request is not None:
        with pytest.raises(MemoryQuotaExceeded):
            request.result()
    assert lab.call(engine, program, lab.Affine(2.0), 3.0)[0].item() == 6.0, "nobody else is concerned"

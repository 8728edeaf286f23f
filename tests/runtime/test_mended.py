"""Defects that were mended once: each of these failed before."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from torch_mux.runtime.forecasts import Forecasts
from torch_mux.runtime.tally import TenantTally
from torch_mux.types import Quota

CPU = torch.device("cpu")


def test_a_deadline_is_refused_only_for_what_is_ahead_in_its_own_queue(lab: Any) -> None:
    """Others' requests, and the tenant's own to another model, are not ahead of it."""
    engine, fast, model = lab.engine(max_bundle=1), lab.program(), lab.Affine()
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

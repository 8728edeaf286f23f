"""Reserves follow the latest quota and go with the tenant's models; tokens of held requests come back."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch

import torch_mux
from torch_mux.errors import InvalidQuota
from torch_mux.types import Quota


def test_a_request_cancelled_while_it_is_held_gives_its_token_back(lab: Any) -> None:
    clock = [0.0]
    engine, program, model = lab.engine(clock=lambda: clock[0]), lab.program("slow"), lab.Affine()
    lab.slow["slow"] = threading.Event()  # nothing goes out before its plan is there
    quota = Quota("slow", rate=1.0, burst=1)
    first = lab.submit(engine, program, model, quota=quota)
    held = [lab.submit(engine, program, model, quota=quota) for _ in range(3)]
    assert [request.eligible for request in held] == [1.0, 2.0, 3.0]
    assert all(request.cancel() for request in held)
    again = lab.submit(engine, program, model, quota=quota)
    assert again.eligible == 1.0
    assert first.cancel(), "it was not held: its token is spent"
    assert lab.submit(engine, program, model, quota=quota).eligible == 2.0
    clock[0] = 10.0
    lab.slow["slow"].set()
    engine.wait([again])


def reserving(lab: Any, engine: Any, tenant: str, reserve: float, model: Any) -> None:
    lab.submit(engine, lab.program(), model, quota=Quota(tenant, reserve=reserve)).result()


def test_a_reserve_goes_with_the_tenants_last_model(lab: Any) -> None:
    engine, alices, bobs = lab.engine(), lab.Affine(), lab.Affine()
    reserving(lab, engine, "alice", 0.7, alices)
    with pytest.raises(InvalidQuota, match=r"1\.3.*'alice' 0\.7, 'bob' 0\.6"):
        reserving(lab, engine, "bob", 0.6, bobs)
    engine.remove(alices.tensors())
    reserving(lab, engine, "bob", 0.6, bobs)
    engine.restore(alices.tensors())
    with pytest.raises(InvalidQuota, match=r"'alice' 0\.7, 'bob' 0\.6"):
        reserving(lab, engine, "alice", 0.7, alices)
    del bobs
    gc.collect()
    reserving(lab, engine, "alice", 0.7, alices)


def test_a_reserve_stands_while_a_request_of_a_removed_model_is_pending(lab: Any) -> None:
    engine, program, alices, bobs = lab.engine(), lab.program(), lab.Affine(), lab.Affine()
    request = lab.submit(engine, program, alices, quota=Quota("alice", reserve=0.7))
    engine.remove(alices.tensors())
    with pytest.raises(InvalidQuota):
        reserving(lab, engine, "bob", 0.6, bobs)
    request.result()
    reserving(lab, engine, "bob", 0.6, bobs)


def test_a_reserve_that_is_lowered_makes_room_at_once(lab: Any) -> None:
    engine, alices, bobs = lab.engine(), lab.Affine(), lab.Affine()
    reserving(lab, engine, "alice", 0.7, alices)
    engine.lower_reserve("alice", 0.9)
    with pytest.raises(InvalidQuota):
        reserving(lab, engine, "bob", 0.6, bobs)
    engine.lower_reserve("alice", 0.4)
    reserving(lab, engine, "bob", 0.6, bobs)


def test_an_updated_quota_is_followed_before_its_next_request() -> None:
    model = torch.compile(torch.nn.Linear(4, 4).eval(), backend="mux")
    x = torch.ones(1, 4)
    with torch.inference_mode():
        alice = torch_mux.quota("alice", reserve=0.7)
        with alice:
            model(x)
        with torch_mux.quota("bob", reserve=0.6), pytest.raises(InvalidQuota):
            model(x)
        alice.update(reserve=0.4)
        with torch_mux.quota("bob", reserve=0.6):
            model(x)

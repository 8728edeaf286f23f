"""What reset and remove let go of goes at once, without the garbage collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import torch_mux
from torch_mux import state


@pytest.fixture
def uncollected() -> Iterator[None]:
    """No garbage collector; engine and settings are as new before and after."""
    torch_mux.reset()
    yield
    gc.enable()
    torch_mux.configure(pack=None)
    torch_mux.reset()


def _models() -> list[nn.Module]:
    torch.manual_seed(0)
    narrow = [nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(2)]
    wide = [nn.Sequential(nn.Linear(16, 40), nn.GELU(), nn.Linear(40, 16)) for _ in range(2)]
    return [model.eval() for model in (*narrow, *wide)]


def _without_collector() -> None:
    gc.collect()
    gc.disable()


@pytest.mark.parametrize("pack", [1, 4])
def test_a_reset_frees_tables_while_models_and_answers_are_kept(uncollected: None, pack: int) -> None:
    torch_mux.configure(pack=pack)
    compiled = [torch.compile(model, backend="mux") for model in _models()]
    x = torch.randn(1, 16)
    with torch.inference_mode():
        for _ in range(4):
            torch_mux.gather(*[(model, x) for model in compiled])
        futures = [torch_mux.submit(model, x) for model in compiled]
        before = [future.result() for future in futures]
        with torch_mux.quota("limited", memory="1GiB"):
            torch_mux.gather(*[(model, x) for model in compiled])
    torch_mux.stats()
    torch_mux.explain()
    tables: list[weakref.ref[Any]] = []
    for served in state.engine()._served.values():
        tables += [weakref.ref(served.compiled), weakref.ref(served.storage)]
    del served
    assert len(tables) == 4
    _without_collector()
    torch_mux.reset()
    assert [type(found()).__name__ for found in tables if found() is not None] == []
    with torch.inference_mode():
        after = torch_mux.gather(*[(model, x) for model in compiled])
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert all(torch.equal(one, future.result()) for one, future in zip(before, futures, strict=True))


def test_a_removed_model_leaves_no_copy_and_no_weight(uncollected: None) -> None:
    models = _models()[:2]
    compiled = [torch.compile(model, backend="mux") for model in models]
    x = torch.randn(1, 16)
    with torch.inference_mode():
        torch_mux.gather(*[(model, x) for model in compiled])
        torch_mux.submit(compiled[0], x).result()
    (served,) = state.engine()._served.values()
    rows = served.storage._rows
    assert len(rows) == 2
    weights = [weakref.ref(parameter) for parameter in models[0].parameters()]
    assert len(weights) == 4
    _without_collector()
    torch_mux.remove(compiled[0])
    assert len(rows) == 1
    del models[0], compiled[0]
    assert not any(weight() is not None for weight in weights)

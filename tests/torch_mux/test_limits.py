"""The limits of a quota through every entry point."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import torch_mux
from torch_mux import DeadlineUnattainable, Overloaded, RateExceeded, Refused


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def model() -> Any:
    with torch.inference_mode(False):
        return torch.compile(nn.Sequential(nn.Linear(4, 4)).eval(), backend="mux", dynamic=False)


def test_a_round_above_a_limit_serves_what_fits_and_raises_for_the_rest(model: Any) -> None:
    x = torch.randn(1, 4)
    torch_mux.gather((model, x), (model, x))
    with torch_mux.quota("a", rate=0.001, burst=2, excess="refuse"):
        with pytest.raises(RateExceeded):
            torch_mux.gather((model, x), (model, x), (model, x))
        with pytest.raises(Refused):
            model(x)
        with pytest.raises(RateExceeded, match="try again"):
            torch_mux.submit(model, x).result(timeout=60)
    got = torch_mux.stats().tenants["a"]
    assert (got.accepted, got.ok, got.refused) == (2, 2, 3)


def test_limits_can_be_changed_while_they_hold(model: Any) -> None:
    x = torch.randn(1, 4)
    torch_mux.gather((model, x))
    limits = torch_mux.quota("a", max_pending=2)
    with limits:
        with pytest.raises(Overloaded, match="max_pending=2"):
            torch_mux.gather(*[(model, x)] * 3)
        limits.update(max_pending=3)
        assert len(torch_mux.gather(*[(model, x)] * 3)) == 3
        limits.update(rate=0.001, burst=1, deadline="60s")
        torch_mux.gather((model, x))
        with pytest.raises(DeadlineUnattainable):
            torch_mux.gather((model, x))
    text = str(torch_mux.stats())
    assert "late" in text and "expired" in text and "refused" in text

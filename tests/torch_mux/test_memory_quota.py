"""``quota(memory=...)`` through every entry point."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_mux
from torch_mux.errors import MemoryQuotaExceeded


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.norm(torch.relu(self.fc1(x))))
        return out


class Counting(Net):
    """Stays on the guarded path."""

    count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return super().forward(x)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def make(count: int, kind: type[Net] = Net) -> list[Any]:
    with torch.inference_mode(False):
        return [torch.compile(kind().eval(), backend="mux", dynamic=False) for _ in range(count)]


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_kind", [Net, Counting])
def test_a_request_above_its_memory_quota_is_its_own_error(model_kind: type[Net]) -> None:
    rich, poor = make(2, model_kind)
    x = torch.randn(2, 8)
    for model in (rich, poor):
        torch_mux.gather((model, x))
    with torch_mux.quota("alice", memory="300B"):
        with pytest.raises(MemoryQuotaExceeded, match=r"alice.*(Net|Counting).*memory=300"):
            torch_mux.gather((poor, x))
        with pytest.raises(MemoryQuotaExceeded):
            poor(x)
        future = torch_mux.submit(poor, x)
        with pytest.raises(MemoryQuotaExceeded):
            future.result(timeout=60)
    close(torch_mux.gather((rich, x))[0], Net.forward(rich._orig_mod, x))
    assert torch_mux.stats().tenants["default"].held > 0
    assert "held MiB" in str(torch_mux.stats())


def test_a_refused_request_of_a_round_stops_no_other() -> None:
    one, other = make(2)
    x = torch.randn(2, 8)
    torch_mux.gather((one, x), (other, x))
    torch_mux.gather((one, x), (other, x))
    ok = torch_mux.stats().tenants["default"].ok
    small = torch_mux.stats().tenants["default"].held + 2 * 4 * 4 + 8
    with torch_mux.quota(memory=small), pytest.raises(MemoryQuotaExceeded):
        torch_mux.gather((one, x), (other, x))
    assert torch_mux.stats().tenants["default"].ok == ok + 1

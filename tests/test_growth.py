"""Nothing grows over ten thousand requests, nor over two hundred models that come and go."""

from __future__ import annotations

import gc
from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import torch_mux
from torch_mux import state

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


def _resident() -> int:
    """Resident pages of this process, in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def _model(device: str) -> nn.Module:
    return (
        nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.LayerNorm(128), nn.Linear(128, 8)).eval().to(device)
    )


def _memory(device: str) -> int:
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    return _resident()


@pytest.mark.parametrize("device", DEVICES)
def test_ten_thousand_requests(device: str) -> None:
    models = [torch.compile(_model(device), backend="mux") for _ in range(4)]
    inputs = [torch.randn(1, 64, device=device) for _ in range(4)]
    bundle = list(zip(models, inputs, strict=True))
    with torch.inference_mode():
        for _ in range(300):
            torch_mux.gather(*bundle)
        state.engine().quiesce(ahead=True)  # what compiles for sizes to come makes objects of its own
        memory, objects = [_memory(device)], [Counter(map(type, gc.get_objects()))]
        for _ in range(2):
            for _ in range(1250):
                torch_mux.gather(*bundle)
            memory.append(_memory(device))
            objects.append(Counter(map(type, gc.get_objects())))
    assert sum(tenant.ok for tenant in torch_mux.stats().tenants.values()) >= 10_000
    assert memory[2] - memory[0] < (8 << 20)
    # What grows with requests grows in both halves; what a thread in the background makes once does not.
    grown = [(after - before) for before, after in pairwise(objects)]
    assert min(each.total() for each in grown) < 1000, [each.most_common(5) for each in grown]


@pytest.mark.parametrize("device", DEVICES)
def test_two_hundred_models_come_and_go(device: str) -> None:
    x = torch.randn(1, 64, device=device)

    def one() -> Tensor:
        with torch.inference_mode():
            return torch.compile(_model(device), backend="mux")(x)  # type: ignore[no-any-return]

    for _ in range(20):
        one()
    before = _memory(device)
    for _ in range(200):
        one()
    one()
    assert _memory(device) - before < (16 << 20)
    (program,) = state.engine().plans()
    assert program.instances <= 4

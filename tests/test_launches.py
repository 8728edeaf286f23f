"""Coalescing shown by the profiler: operations and launches stay flat while the bundle grows."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import torch_mux


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.down(F.gelu(self.up(x)))  # type: ignore[no-any-return]


def _models(count: int, device: str) -> tuple[list[nn.Module], list[Tensor]]:
    models = [Small().eval().to(device) for _ in range(count)]
    compiled = [torch.compile(model, backend="mux") for model in models]
    return compiled, [torch.randn(1, 3, 8, 8, device=device) for _ in range(count)]  # type: ignore[return-value]


def test_operations_stay_flat_on_the_cpu() -> None:
    compiled, inputs = _models(16, "cpu")
    seen: dict[int, Counter[str]] = {}
    with torch.inference_mode():
        torch_mux.gather(*zip(compiled, inputs, strict=True))
        torch_mux.gather(*zip(compiled, inputs, strict=True))
        for size in (1, 4, 16):
            with profile(activities=[ProfilerActivity.CPU]) as trace:
                torch_mux.gather(*zip(compiled[:size], inputs[:size], strict=True))
            seen[size] = Counter(event.name for event in trace.events() if event.name.startswith("mux::slot"))
    assert seen[1] == seen[4] == seen[16]
    assert seen[16] == {"mux::slot_convolution": 1, "mux::slot_linear": 2}


@pytest.mark.gpu
def test_launches_stay_flat_on_the_gpu() -> None:
    compiled, inputs = _models(16, "cuda")
    launches: dict[int, int] = {}
    with torch.inference_mode():
        for size in (1, 2, 4, 8, 16):
            torch_mux.warmup(compiled[0], inputs[0], sizes=(size,))
        for size in (1, 2, 4, 8, 16):
            bundle = list(zip(compiled[:size], inputs[:size], strict=True))
            for _ in range(3):
                torch_mux.gather(*bundle)
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as trace:
                torch_mux.gather(*bundle)
                torch.cuda.synchronize()
            kernels = [e for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
            launches[size] = sum(
                "memcpy" not in e.name.lower() and "memset" not in e.name.lower() for e in kernels
            )
    assert len(set(launches.values())) == 1, launches

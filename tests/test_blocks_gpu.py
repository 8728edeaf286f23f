"""On the device: the first stage of a ResNet-50, its chains in one launch each or in three."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import torch_mux
from torch_mux.lowering.kernels import choose_block

pytestmark = pytest.mark.gpu


def _norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    for values in (norm.running_var, norm.weight):
        nn.init.uniform_(values, 0.5, 1.5)
    for values in (norm.running_mean, norm.bias):
        nn.init.normal_(values)
    return norm


class Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.narrow, self.n1 = nn.Conv2d(channels, width, 1, bias=False), _norm(width)
        self.middle, self.n2 = nn.Conv2d(width, width, 3, padding=1, bias=False), _norm(width)
        self.wide, self.n3 = nn.Conv2d(width, 4 * width, 1, bias=False), _norm(4 * width)
        self.skip: nn.Module = nn.Identity()
        if channels != 4 * width:
            self.skip = nn.Sequential(nn.Conv2d(channels, 4 * width, 1, bias=False), _norm(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.n1(self.narrow(x)))
        y = F.relu(self.n2(self.middle(y)))
        return F.relu(self.n3(self.wide(y)) + self.skip(x))


class Stage(nn.Module):
    """Three bottlenecks, and what the next stage begins with."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Bottleneck(64, 64), Bottleneck(256, 64), Bottleneck(256, 64))
        self.next, self.norm = nn.Conv2d(256, 128, 1, bias=False), _norm(128)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.blocks(x)
        return x, F.relu(self.norm(self.next(x)))


def answers(
    models: list[nn.Module], inputs: list[Tensor]
) -> tuple[list[list[Tensor]], list[list[Tensor]], list[str], dict[str, int]]:
    """Each model's results in a bundle of all and alone, the bundle's kernels, and what the plan says."""
    torch._dynamo.reset()
    compiled = [torch.compile(model, backend="mux") for model in models]
    with torch.inference_mode():
        torch_mux.warmup(compiled[0], inputs[0], sizes=(1, len(models)))
        bundle = list(zip(compiled, inputs, strict=True))
        for _ in range(3):
            torch_mux.gather(*bundle)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            together = torch_mux.gather(*bundle)
            torch.cuda.synchronize()
        alone = [model(x) for model, x in bundle]
    kernels = [e.name for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    (program,) = torch_mux.explain().programs
    found = (
        [list(map(torch.clone, each)) for each in together],
        [list(map(torch.clone, each)) for each in alone],
    )
    torch_mux.reset()
    return *found, kernels, dict(program.kernels)


def test_fused_chains_have_the_bits_of_single_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    if not choose_block.fused_on(torch.device("cuda")):
        pytest.skip("chains are one launch on compute capability 9.0 only")
    torch.manual_seed(0)
    models = [Stage().eval().half().cuda().to(memory_format=torch.channels_last) for _ in range(16)]
    inputs = [
        torch.randn(1, 64, 56, 56, device="cuda").half().to(memory_format=torch.channels_last)
        for _ in range(16)
    ]
    fused = answers(models, inputs)
    monkeypatch.setattr(choose_block, "fused_on", lambda device: False)
    apart = answers(models, inputs)
    assert fused[3] == {"block": 3, "conv": 2} and apart[3] == {"conv": 11}
    assert sum("block_kernel" in name for name in fused[2]) == 3
    assert sum("conv_kernel" in name or "linear_kernel" in name for name in fused[2]) == 2
    assert sum("conv_kernel" in name or "linear_kernel" in name for name in apart[2]) == 11
    for one in (fused[0], fused[1], apart[1]):
        for got, want in zip(one, apart[0], strict=True):
            assert len(got) == len(want) == 2
            assert all(map(torch.equal, got, want))
    assert all(bool(torch.isfinite(each).all()) and bool(each.any()) for got in fused[0] for each in got)

"""On the device: a first convolution, its strided columns folded into channels, answers as PyTorch does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_mux

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("channels", "size", "kernel", "stride", "padding"), [
    (3, (64, 64), 7, 2, 3),
    (3, (33, 31), 3, 2, 1),
    (4, (20, 24), (5, 4), (1, 2), (0, 1)),
    (1, (17, 40), 3, (3, 2), 0),
    (3, (16, 21), 2, 2, 0),
])  # fmt: skip
def test_answers_alone_and_together(
    channels: int, size: tuple[int, int], kernel: int, stride: int, padding: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    nets = [nn.Conv2d(channels, 24, kernel, stride, padding).eval().to("cuda", dtype) for _ in range(3)]
    images = [torch.randn(2, channels, *size, device="cuda").to(dtype) for _ in nets]
    served = [torch.compile(net, backend="mux", dynamic=False) for net in nets]
    with torch.inference_mode():
        alone = [net(image) for net, image in zip(served, images, strict=True)]
        together: list[Tensor] = list(torch_mux.gather(*zip(served, images, strict=True)))
    for net, image, one, other in zip(nets, images, alone, together, strict=True):
        assert torch.equal(one, other)
        assert net.bias is not None
        want = F.conv2d(image.double(), net.weight.double(), net.bias.double(), stride, padding)
        off = 2e-5 if dtype is torch.float32 else torch.finfo(dtype).eps * 2
        torch.testing.assert_close(one.double(), want, rtol=off, atol=off)

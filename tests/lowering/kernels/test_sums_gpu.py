"""On the device: every tile of a half-precision class leaves the same float32 sums, to their low bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_mux.lowering.kernels import choose
from torch_mux.lowering.kernels.conv import conv
from torch_mux.lowering.kernels.data import Tile
from torch_mux.lowering.kernels.linear import linear

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
SLOTS = 2
# channels in, height and width, channels out, kernel, stride, padding: the first is one step in some tiles
CONV = [(4, 40, 64, 7, 2, 3), (64, 14, 64, 3, 1, 1), (64, 4, 128, 3, 1, 1), (256, 14, 256, 3, 2, 1)]


def operand(shape: tuple[int, ...], fan: int, dtype: torch.dtype, spread: int) -> Tensor:
    """Random numbers whose magnitudes reach over 2 to the ``spread``."""
    values = torch.randn(shape, device=CUDA) / fan**0.5
    return (values * torch.exp2(-torch.randint(0, spread + 1, shape, device=CUDA))).to(dtype)


def check(run: Callable[[Tensor | None, Tile], Tensor], tiles: Sequence[Tile]) -> None:
    """Subtracting the rounded sum as a residual leaves the low bits of the sum."""
    rounded = run(None, tiles[0])
    first = run(-rounded, tiles[0])
    assert torch.count_nonzero(first) > first.numel() // 2
    for tile in tiles[1:]:
        assert torch.equal(run(-rounded, tile), first), tile


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spread", [0, 12])
@pytest.mark.parametrize(("m", "n", "k"), [(197, 768, 768), (49, 512, 4608)])
def test_linear(gpu_tools: Any, dtype: torch.dtype, spread: int, m: int, n: int, k: int) -> None:
    x = operand((SLOTS, m, k), 1, dtype, spread)
    weights = [operand((n, k), k, dtype, spread) for _ in range(SLOTS)]
    rows, table, control = (
        torch.arange(SLOTS, device=CUDA),
        gpu_tools.table(weights),
        gpu_tools.control(2, 132),
    )

    def run(residual: Tensor | None, tile: Tile) -> Tensor:
        out = torch.full((SLOTS, m, n), 7.0, dtype=dtype, device=CUDA)
        linear(x, table, 1, rows, control, out, n=n, k=k, residual=residual, tile=tile)
        return out

    check(run, choose.candidates(choose.linear_class([(m, n, k)], dtype), dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spread", [0, 12])
@pytest.mark.parametrize("layer", CONV)
def test_convolution(gpu_tools: Any, dtype: torch.dtype, spread: int, layer: tuple[int, ...]) -> None:
    c, size, o, kernel, stride, padding = layer
    side, k = (size + 2 * padding - kernel) // stride + 1, kernel * kernel * c
    x = operand((SLOTS, 1, size, size, c), 1, dtype, spread)
    weights = [operand((o, kernel, kernel, c), k, dtype, spread) for _ in range(SLOTS)]
    rows, table, control = (
        torch.arange(SLOTS, device=CUDA),
        gpu_tools.table(weights),
        gpu_tools.control(2, 132),
    )

    def run(residual: Tensor | None, tile: Tile) -> Tensor:
        out = torch.full((SLOTS, 1, side, side, o), 7.0, dtype=dtype, device=CUDA)
        conv(
            x, table, 1, rows, control, out, kernel=(kernel, kernel), stride=(stride, stride),
            padding=(padding, padding), residual=residual, tile=tile,
        )  # fmt: skip
        return out

    bit_class = choose.conv_class([(side * side, o, k)], [c], kernel * kernel, dtype, False)
    check(run, choose.candidates(bit_class, dtype, lean=False))

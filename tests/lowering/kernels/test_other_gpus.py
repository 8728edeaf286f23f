"""GPUs other than the one that the tiles are tuned on: every family compiles and fits, untuned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from torch_mux.lowering.kernels import choose
from torch_mux.lowering.kernels.common import Launch
from torch_mux.lowering.kernels.conv import conv_launch
from torch_mux.lowering.kernels.data import BitClass, Family, Vector
from torch_mux.lowering.kernels.depthwise import depthwise_launch
from torch_mux.lowering.kernels.inspection import compile_launch
from torch_mux.lowering.kernels.linear import linear_launch

HALF, FULL = torch.float16, torch.float32
TABLE, ROWS = torch.zeros(16, 4, dtype=torch.int64), torch.zeros(16, dtype=torch.int64)
CONTROL, ARENA = torch.zeros(2, dtype=torch.int32), torch.zeros(16, 8192)
#: Bytes of shared memory that one program may have: A100, RTX 30xx, L4 and RTX 40xx, B200, RTX 50xx.
SHARED = {80: 166912, 86: 101376, 89: 101376, 100: 232448, 120: 101376}


def _linear(dtype: torch.dtype, m: int = 197, **named: Any) -> Launch:
    x, out = torch.empty(4, m, 768, dtype=dtype), torch.empty(4, m, 768, dtype=dtype)
    return linear_launch(
        x, TABLE, 1, ROWS[:4], CONTROL, out, n=768, k=768, shift=Vector(ARENA, 0), activation="gelu", sms=100,
        **named,
    )  # fmt: skip


def _conv(dtype: torch.dtype, channels: int = 64, kernel: int = 3, **named: Any) -> Launch:
    x, out = torch.empty(4, 1, 28, 28, channels, dtype=dtype), torch.empty(4, 1, 28, 28, 64, dtype=dtype)
    return conv_launch(
        x, TABLE, 1, ROWS[:4], CONTROL, out, kernel=(kernel, kernel), padding=(kernel // 2, kernel // 2),
        scale=Vector(ARENA, 0), shift=Vector(ARENA, 4096), activation="relu", sms=100, **named,
    )  # fmt: skip


def _depthwise() -> Launch:
    x = torch.empty(4, 1, 28, 28, 96, dtype=HALF)
    return depthwise_launch(
        x, TABLE, 1, ROWS[:4], CONTROL, torch.empty_like(x), kernel=(5, 5), padding=(2, 2), sms=100
    )


def _largest(bit_class: BitClass, dtype: torch.dtype) -> Any:
    tiles = choose.candidates(bit_class, dtype)
    return max(tiles, key=lambda tile: (tile.block_m + tile.block_n) * tile.block_k * tile.stages)


LAUNCHES: dict[str, Callable[[], Launch]] = {
    "linear": lambda: _linear(HALF, tile=_largest(BitClass(Family.WGMMA), HALF)),
    "linear, few rows": lambda: _linear(HALF, m=1, tile=_largest(BitClass(Family.MMA), HALF)),
    "linear, true fp32": lambda: _linear(FULL),
    "conv": lambda: _conv(HALF, tile=_largest(BitClass(Family.WGMMA), HALF)),
    "conv, few channels": lambda: _conv(HALF, channels=4, kernel=7),
    "depthwise": _depthwise,
}


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("name", LAUNCHES)
def test_it_compiles_and_fits(name: str, capability: int) -> None:
    found = compile_launch(LAUNCHES[name](), capability)
    assert found.shared <= SHARED[capability]
    assert found.wgmma == 0  # instructions of compute capability 9 alone

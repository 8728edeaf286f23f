"""What attention compiles to: nothing spills, keys and values stream in, the softmax is laid out once."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch

from torch_mux.lowering.kernels import choose_attention
from torch_mux.lowering.kernels.attention import attention_launch
from torch_mux.lowering.kernels.choose_attention import Size
from torch_mux.lowering.kernels.common import Launch
from torch_mux.lowering.kernels.data import Tile
from torch_mux.lowering.kernels.inspection import compile_launch

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
CONTROL = torch.zeros(2, dtype=torch.int32)
#: Bytes of shared memory that one program may have: A100, RTX 30xx, L4 and RTX 40xx, B200, RTX 50xx.
SHARED = {80: 166912, 86: 101376, 89: 101376, 100: 232448, 120: 101376}


def launch_of(
    length: int, channels: int, dtype: torch.dtype, mask: str = "none", causal: bool = False, **named: Any
) -> Launch:
    """Four heads out of a joint buffer. ``mask``: "none", a row of "keys", or a "whole" one."""
    width = 4 * channels
    joint = torch.empty(16, 1, length, 3 * width, dtype=dtype)
    heads = [part.unflatten(-1, (4, -1)).transpose(2, 3) for part in torch.split(joint, width, -1)]
    rows = {"none": 0, "keys": 1, "whole": length}[mask]
    added = torch.empty(16, 1, 1, rows, length, dtype=dtype) if rows else None
    out = torch.empty(16, 1, length, 4, channels, dtype=dtype)
    return attention_launch(*heads, CONTROL, out, mask=added, is_causal=causal, sms=132, **named)


def tiles_of(length: int, channels: int, dtype: torch.dtype, mask: str, causal: bool) -> tuple[Tile, ...]:
    size = Size(length, length, channels, channels)
    bits = choose_attention.bit_class(size, dtype)
    return choose_attention.candidates(size, bits, mask != "none", causal)


HALVES = [
    *itertools.product([(197, 64, HALF), (128, 64, HALF)], ["none", "keys", "whole"], [False, True]),
    *itertools.product([(197, 32, HALF), (197, 80, BRAIN), (128, 128, HALF)], ["none", "whole"], [False]),
    ((20, 64, BRAIN), "whole", True),
]


@pytest.mark.parametrize(("shape", "mask", "causal"), HALVES)
def test_every_tile_fits_and_streams(shape: tuple[int, int, torch.dtype], mask: str, causal: bool) -> None:
    for tile in tiles_of(*shape, mask, causal):
        found = compile_launch(launch_of(*shape, mask, causal, tile=tile))
        assert found.stack == 0 and found.wgmma > 0, tile
        assert found.cp_async > 0
        narrowest = min(tile.block_k, tile.block_n) * choose_attention.padded(shape[1])
        assert found.cp_async_bytes == min(16, 2 * narrowest // (32 * tile.warps)), tile
        assert found.programs_per_sm >= tile.programs_per_sm, tile
        weights = tile.block_m * tile.block_k // (32 * tile.warps)
        rows = 2 * tile.block_m // (16 * tile.warps)  # and what rescales the sums so far
        assert len(re.findall(r"ex2\.approx", found.ptx)) == weights + rows, tile


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("mask", ["none", "whole"])
@pytest.mark.parametrize("channels", [32, 64])
def test_single_precision_fits(channels: int, mask: str, tf32: bool) -> None:
    launch = launch_of(197, channels, FULL, mask, allow_tf32=tf32)
    found = compile_launch(launch)
    assert found.stack == 0
    assert found.wgmma % (1 if tf32 else 3) == 0 and found.wgmma > 0
    assert found.programs_per_sm >= launch.tile.programs_per_sm


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize(("channels", "dtype"), [(64, HALF), (128, BRAIN), (64, FULL)])
def test_other_gpus_compile_it_too(channels: int, dtype: torch.dtype, capability: int) -> None:
    found = compile_launch(launch_of(197, channels, dtype, "keys"), capability)
    assert found.shared <= SHARED[capability]
    assert found.wgmma == 0

"""The tile of an attention moves with slots and multiprocessors, and never leaves its bit class."""

from __future__ import annotations

import itertools

import pytest
import torch

from torch_mux.lowering.kernels import choose_attention
from torch_mux.lowering.kernels.choose_attention import Size
from torch_mux.lowering.kernels.data import BitClass, Family, Tile

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
SIZES = [Size(197, 197, 64, 64), Size(128, 128, 64, 64), Size(5, 9, 12, 12), Size(512, 4096, 128, 96)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "tf32"), [(HALF, False), (BRAIN, False), (FULL, False), (FULL, True)])
def test_every_choice_is_of_the_class(size: Size, dtype: torch.dtype, tf32: bool) -> None:
    bits = choose_attention.bit_class(size, dtype, tf32)
    for heads, sms, masked, causal in itertools.product((1, 12, 192), (1, 40, 132), *[(False, True)] * 2):
        tile = choose_attention.tile(size, heads, dtype, bits, sms, masked, causal)
        assert tile in choose_attention.candidates(size, bits, masked, causal)
        choose_attention.check(tile, bits)


def test_few_heads_take_low_tiles_and_causal_ones_always_do() -> None:
    size = Size(256, 256, 64, 64)
    bits = choose_attention.bit_class(size, HALF)
    rows = {tile.block_m for tile in choose_attention.candidates(size, bits)}
    assert choose_attention.tile(size, 1, HALF, bits, 132).block_m == min(rows) < max(rows)
    assert [tile.block_m for tile in choose_attention.candidates(size, bits, is_causal=True)] == [min(rows)]


@pytest.mark.parametrize("size", SIZES)
def test_where_nothing_is_settled_the_shape_alone_decides(size: Size) -> None:
    bits = choose_attention.bit_class(size, HALF)
    found = {choose_attention.tile(size, heads, HALF, bits, 80, settled=False) for heads in (1, 12, 1200)}
    assert len(found) == 1


def test_another_step_or_family_is_refused() -> None:
    for tile in (Tile(64, 64, 32, 4, 2, 3), Tile(32, 64, 64, 2, 2, 3)):
        with pytest.raises(ValueError, match="outside"):
            choose_attention.check(tile, BitClass(Family.WGMMA, step=64))


@pytest.mark.parametrize(
    ("size", "half", "full"),
    [
        (Size(512, 4096, 64, 64), True, False),
        (Size(257, 257, 64, 64), True, True),
        (Size(1, 1, 1, 1), True, True),
        (Size(197, 197, 80, 128), True, False),
        (Size(16385, 64, 64, 64), False, False),
        (Size(64, 16385, 64, 64), False, False),
        (Size(64, 64, 64, 129), False, False),
        (Size(64, 0, 64, 64), False, False),
    ],
)
def test_what_is_ours(size: Size, half: bool, full: bool) -> None:
    assert choose_attention.owned(size, HALF) == choose_attention.owned(size, BRAIN) == half
    assert choose_attention.owned(size, FULL) == full
    assert not choose_attention.owned(size, torch.float64)
    assert choose_attention.owned(size, HALF, masked=True) == (half and max(size.queries, size.keys) <= 257)

"""Which tile a launch uses: pure functions of shapes, dtype, slots and multiprocessors.

The bit class is a function of the operation's shape and dtype alone; within it the tile may follow the
number of slots, because every tile of a class gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch

from torch_mux.lowering.kernels.data import BitClass, Family, Tile, family_of

__all__ = ["candidates", "check", "conv_class", "conv_tile", "linear_class", "seconds", "tile", "tiles_of"]

Sizes = Sequence[tuple[int, int, int]]

# Rates of one H100 multiprocessor: what a tile of each family reaches of its peak, and reads from L2.
_FLOPS = {Family.WGMMA: 4.2e12, Family.MMA: 2.2e12, Family.FMA: 0.25e12}
_BYTES = 36e9
_HBM = 2.9e12
_STEP = 0.32e-6
_FIXED = 1.6e-6
_STEP_EXTRA = 16  # what one step costs besides its elements, in elements


def _one(values: set[BitClass]) -> BitClass:
    if len(values) != 1:
        raise ValueError(f"slots of one launch must share a bit class, these have {sorted(map(str, values))}")
    return next(iter(values))


def _family(m: int, dtype: torch.dtype, allow_tf32: bool) -> tuple[Family, str]:
    precision = "tf32" if dtype == torch.float32 and allow_tf32 else "ieee"
    if dtype == torch.float32 and not allow_tf32:
        return Family.FMA, precision
    return (Family.MMA if m <= 16 else Family.WGMMA), precision


def linear_class(sizes: Sizes, dtype: torch.dtype, allow_tf32: bool = False) -> BitClass:
    """The bit class of a linear layer: few rows (m ≤ 16) fill only a warp's tensor core instructions.

    Args:
        sizes: (m, n, k) of every slot.

    Raises:
        ValueError: slots of different classes.
    """
    return _one({BitClass(*_split(_family(m, dtype, allow_tf32))) for m, _, _ in set(sizes)})


def _split(pair: tuple[Family, str]) -> tuple[Family, bool, bool, str]:
    return pair[0], False, False, pair[1]


def conv_class(
    sizes: Sizes, channels: Sequence[int], taps: int, dtype: torch.dtype, allow_tf32: bool
) -> BitClass:
    """The bit class of a convolution: K is flattened where a tap alone would not fill a step.

    Args:
        sizes: (output pixels, output channels, taps by channels) of every slot.
        channels: input channels of every slot.
        taps: kernel height by width.

    Raises:
        ValueError: slots of different classes.
    """
    found = set()
    for (m, _, _), count in zip(sizes, channels, strict=True):
        family, precision = _family(m, dtype, allow_tf32)
        found.add(BitClass(family, False, taps > 1 and count < 64, precision))
    return _one(found)


_WGMMA = (
    Tile(128, 128, 64, 4, 3, 2),
    Tile(128, 64, 64, 4, 3, 3),
    Tile(64, 128, 64, 4, 3, 3),
    Tile(64, 64, 64, 4, 4, 3),
    Tile(64, 32, 64, 4, 4, 4),
    Tile(128, 256, 64, 8, 3, 1),
    Tile(64, 16, 64, 4, 4, 4),
)
_MMA = (
    Tile(16, 16, 256, 4, 4, 3),
    Tile(16, 32, 256, 4, 3, 3),
    Tile(16, 64, 128, 4, 4, 2),
    Tile(16, 128, 64, 4, 4, 2),
)
_FMA = (
    Tile(64, 64, 16, 8, 3, 2),
    Tile(32, 64, 16, 4, 3, 4),
    Tile(32, 32, 16, 4, 3, 4),
    Tile(16, 32, 32, 4, 3, 4),
    Tile(16, 16, 64, 4, 3, 4),
)


_GATHER = (
    Tile(128, 64, 32, 4, 3, 3),
    Tile(64, 64, 64, 4, 4, 3),
    Tile(128, 128, 32, 4, 3, 2),
    Tile(64, 32, 64, 4, 4, 4),
)
_NARROW = (
    Tile(64, 64, 32, 4, 3, 2),
    Tile(128, 64, 16, 4, 3, 2),
    Tile(64, 32, 32, 4, 3, 2),
)


def candidates(bit_class: BitClass, dtype: torch.dtype, narrow: bool = False) -> tuple[Tile, ...]:
    """Every tile of a bit class that is worth timing.

    Args:
        narrow: pixels are gathered one channel at a time, which takes registers for every address.
    """
    if bit_class.family is Family.FMA:
        return _FMA
    base: tuple[Tile, ...] = _WGMMA if bit_class.family is Family.WGMMA else _MMA
    if bit_class.gather and bit_class.family is Family.WGMMA:
        base = _NARROW if narrow else _GATHER
    if bit_class.swap:
        base = tuple(replace(each, block_m=each.block_n, block_n=each.block_m) for each in base)
    if dtype == torch.float32:
        base = tuple(
            replace(each, block_k=max(16, each.block_k // 2), programs_per_sm=min(2, each.programs_per_sm))
            for each in base
        )
    return base


def check(chosen: Tile, bit_class: BitClass, dtype: torch.dtype) -> None:
    """Raises ValueError where ``chosen`` would give other bits than ``bit_class`` promises."""
    family = family_of(chosen, dtype, bit_class.swap, bit_class.precision)
    if family is not bit_class.family or chosen.block_k % 16:
        raise ValueError(f"{chosen} multiplies with {family.value}, outside {bit_class}")


def tiles_of(sizes: Sizes, chosen: Tile) -> int:
    """Tiles that all slots have together."""
    return sum(-(-m // chosen.block_m) * -(-n // chosen.block_n) for m, n, _ in sizes)


def seconds(sizes: Sizes, chosen: Tile, dtype: torch.dtype, bit_class: BitClass, sms: int) -> float:
    """Estimated seconds of one launch: what the busiest multiprocessor does, or the weights through HBM."""
    width = dtype.itemsize
    family = bit_class.family
    flops = _FLOPS[family] * (0.5 if dtype == torch.float32 and family is not Family.FMA else 1.0)
    work, latency, weights = 0.0, 0.0, 0
    for m, n, k in sizes:
        steps = -(-k // chosen.block_k)
        count = -(-m // chosen.block_m) * -(-n // chosen.block_n)
        depth = steps * chosen.block_k
        math = 2.0 * chosen.block_m * chosen.block_n * depth / flops
        traffic = (chosen.block_m + chosen.block_n) * depth * width / _BYTES
        store = chosen.block_m * chosen.block_n * width / _BYTES
        work += count * (max(math, traffic) + store)
        latency = max(latency, steps * _STEP * max(1.0, chosen.block_k / 128) + _FIXED)
        weights += n * k * width
    tiles = tiles_of(sizes, chosen)
    waves = -(-tiles // (sms * chosen.programs_per_sm))
    busiest = work / tiles * -(-tiles // sms) if tiles else 0.0
    return max(busiest + _FIXED, waves * latency, weights / _HBM)


@lru_cache(maxsize=4096)
def _tile(
    sizes: tuple[tuple[int, int, int], ...], dtype: torch.dtype, bit_class: BitClass, sms: int, narrow: bool
) -> Tile:
    return min(
        candidates(bit_class, dtype, narrow), key=lambda each: seconds(sizes, each, dtype, bit_class, sms)
    )


def tile(sizes: Sizes, dtype: torch.dtype, bit_class: BitClass, sms: int, narrow: bool = False) -> Tile:
    """The tile of ``bit_class`` that :func:`seconds` expects to be fastest; the first of equals."""
    return _tile(tuple(sizes), dtype, bit_class, sms, narrow)


def conv_tile(
    sizes: Sizes, channels: Sequence[int], dtype: torch.dtype, bit_class: BitClass, sms: int
) -> Tile:
    """As :func:`tile`, with steps that do not reach far beyond the channels of a tap."""
    narrow = bit_class.gather and any(c % 4 for c in channels)
    chosen = tile(sizes, dtype, bit_class, sms, narrow)
    reduction = [k for _, _, k in sizes] if bit_class.gather else list(channels)
    steps = (step for step in (chosen.block_k, chosen.block_k // 2, chosen.block_k // 4) if step >= 16)
    best = min(steps, key=lambda step: max(-(-c // step) * (step + _STEP_EXTRA) for c in reduction))
    return replace(chosen, block_k=best)

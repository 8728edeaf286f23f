"""Which tile a launch uses: pure functions of shapes, dtype, slots and multiprocessors.

The bit class is a function of the operation's shape and dtype alone; within it the tile may follow the
number of slots and the multiprocessors, because every tile of a class gives the same bits. The tile is the
fastest of the measured table on disk (:mod:`measured`) where that holds a launch of nearly the same sizes,
else what an analytic model (:mod:`estimate`) expects to be fastest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch

from torch_mux.lowering.kernels import measured
from torch_mux.lowering.kernels.data import BitClass, Family, Tile, family_of, precision_of
from torch_mux.lowering.kernels.estimate import depthwise_seconds, seconds

__all__ = [
    "candidates",
    "check",
    "conv_class",
    "conv_tile",
    "depthwise_candidates",
    "depthwise_tile",
    "linear_class",
    "tile",
    "tiles_of",
]

Sizes = Sequence[tuple[int, int, int]]

#: Slots that a tile is chosen for where it may not follow their number.
_TYPICAL = 4
_STEP_EXTRA = 16  # what one step costs besides its elements, in elements
_ADDRESSES = 12288  # elements of a step beyond which the addresses of narrow loads would be spilled


def _one(values: set[BitClass]) -> BitClass:
    if len(values) != 1:
        raise ValueError(f"slots of one launch must share a bit class, these have {sorted(map(str, values))}")
    return next(iter(values))


def _class(
    size: tuple[int, int, int], dtype: torch.dtype, allow_tf32: bool, channels: int | None, taps: int = 1
) -> BitClass:
    """In half precision every tile of either family gives the same bits on an H100. In single precision the
    shape decides: few rows fill only a warp's instructions, and some more rows of a long reduction take them
    as well, since one slot has too few wide tiles for the device.
    """
    precision = precision_of(dtype, allow_tf32)
    gather = channels is not None and taps > 1 and channels < 64
    if precision == "ieee":
        return BitClass(None, gather=gather, precision=precision)
    m, n, k = size
    few = m <= 16 or (m <= 64 and k >= max(2048, 4 * n))
    family = Family.MMA if few else Family.WGMMA
    if precision != "tf32x3":
        return BitClass(family, gather=gather, precision=precision)
    step = _SPLIT[family][0].block_k
    if channels is not None:
        step = _step(step, [k if gather else channels])
    return BitClass(family, gather=gather, precision=precision, step=step)


def linear_class(sizes: Sizes, dtype: torch.dtype, allow_tf32: bool = False) -> BitClass:
    """The bit class of a linear layer.

    Args:
        sizes: (m, n, k) of every slot.

    Raises:
        ValueError: slots of different classes.
    """
    return _one({_class(size, dtype, allow_tf32, None) for size in set(sizes)})


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
    pairs = set(zip(sizes, channels, strict=True))
    return _one({_class(size, dtype, allow_tf32, count, taps) for size, count in pairs})


# Programs a multiprocessor are those that fit, so that a cap in multiprocessors is kept. What is not lean
# needs more registers: of the tiles behind _LEAN not always as many as they say fit.
_WGMMA = (
    Tile(128, 128, 64, 4, 3, 2),
    Tile(64, 128, 64, 4, 4, 2),
    Tile(64, 64, 64, 4, 4, 3),
    Tile(64, 64, 128, 4, 3, 2),
    Tile(64, 32, 64, 4, 4, 4),
    Tile(64, 16, 64, 4, 4, 4),
)
_LEAN = (
    Tile(64, 64, 64, 4, 3, 4),
    Tile(128, 64, 64, 4, 3, 3),
    Tile(64, 128, 64, 4, 3, 3),
)
#: Of half precision besides, in a class that does not swap. One slot is enough for many tiles of few rows.
_LEAN_HALF = (
    Tile(128, 128, 64, 8, 3, 2),
    Tile(128, 64, 64, 4, 4, 2, second_n=32),
    Tile(32, 64, 128, 4, 4, 2, swap=True),
    Tile(32, 64, 64, 4, 4, 4, swap=True),
)
#: Many bytes under way for the long reduction of a convolution over few pixels.
_DEEP = (
    Tile(64, 32, 128, 4, 4, 2),
    Tile(64, 16, 128, 4, 4, 2),
    Tile(64, 64, 64, 4, 6, 2),
)
#: Of half precision besides, one program with most of a multiprocessor's shared memory.
_DEEPEST = (
    Tile(64, 128, 64, 4, 8, 1),
    Tile(128, 128, 64, 8, 6, 1),
)
_MMA = (
    Tile(16, 16, 256, 4, 4, 3),
    Tile(16, 32, 256, 4, 3, 3),
    Tile(16, 32, 128, 4, 4, 4),
    Tile(16, 64, 256, 4, 3, 1),
    Tile(16, 64, 128, 4, 4, 2),
    Tile(16, 128, 64, 4, 4, 2),
)
#: Of true float32. All of a family step alike: what a step adds up is rounded before the next one.
_SPLIT = {
    Family.WGMMA: (
        Tile(64, 64, 32, 4, 3, 2),
        Tile(64, 32, 32, 4, 3, 2),
        Tile(128, 64, 32, 8, 3, 1),
        Tile(128, 128, 32, 8, 3, 1),
    ),
    Family.MMA: (
        Tile(16, 16, 64, 4, 3, 2),
        Tile(16, 32, 64, 4, 3, 2),
        Tile(16, 32, 64, 4, 4, 2),
        Tile(16, 64, 64, 4, 3, 2),
    ),
}
_GATHER = (
    Tile(128, 64, 32, 4, 3, 3),
    Tile(64, 64, 64, 4, 4, 3),
    Tile(128, 128, 32, 4, 3, 2),
    Tile(64, 32, 64, 4, 4, 4),
    Tile(64, 16, 64, 4, 4, 4),
)
_NARROW = (
    Tile(64, 64, 32, 4, 3, 2),
    Tile(128, 64, 16, 4, 3, 2),
    Tile(64, 32, 32, 4, 3, 2),
    Tile(64, 16, 32, 4, 3, 2),
)


def candidates(
    bit_class: BitClass, dtype: torch.dtype, narrow: bool = False, lean: bool = True, wide: bool = True
) -> tuple[Tile, ...]:
    """Every tile of a bit class that is worth considering.

    Args:
        narrow: pixels are gathered one channel at a time, which takes registers for every address.
        lean: a linear layer of equal slots whose weight has its rows along K; neither its transpose nor a
            convolution.
        wide: loads are of 16 bytes, but for gathered pixels. If not, a thread may need all of the 255
            registers that it can have: eight warps of such threads fit.
    """
    if bit_class.family is None:
        each_of = (replace(bit_class, family=family) for family in Family)
        return tuple(tile for one in each_of for tile in candidates(one, dtype, narrow, lean, wide))
    base: tuple[Tile, ...] = _WGMMA if bit_class.family is Family.WGMMA else _MMA
    if bit_class.family is Family.WGMMA:
        base += _LEAN if lean else _DEEP
        if dtype.itemsize == 2 and not bit_class.swap:
            base += _LEAN_HALF if lean else _DEEPEST
    if bit_class.gather and bit_class.family is Family.WGMMA:
        base = _NARROW if narrow else _GATHER
    if bit_class.step:
        base = tuple(replace(each, block_k=bit_class.step) for each in _SPLIT[bit_class.family])
    elif dtype == torch.float32:
        base = tuple(replace(each, block_k=max(16, each.block_k // 2)) for each in base)
    if bit_class.swap:
        base = tuple(replace(each, block_m=each.block_n, block_n=each.block_m) for each in base)
    wide = wide and dtype != torch.float32
    if not wide:
        base = tuple(
            replace(each, programs_per_sm=min(each.programs_per_sm, 8 // each.warps))
            for each in base
            if (each.block_m + each.width) * each.block_k <= _ADDRESSES
        )
    return tuple(dict.fromkeys(base))


def check(chosen: Tile, bit_class: BitClass) -> None:
    """Raises ValueError where ``chosen`` would give other bits than ``bit_class`` promises."""
    if chosen.swap and (bit_class.swap or bit_class.precision != "ieee"):
        raise ValueError(f"{chosen} has weights on the M side, which may give other bits in {bit_class}")
    family = family_of(chosen, bit_class.swap)
    steps = chosen.block_k % 16 == 0 and bit_class.step in (0, chosen.block_k)
    if bit_class.family not in (None, family) or not steps:
        raise ValueError(f"{chosen} multiplies with {family.value}, outside {bit_class}")


def tiles_of(sizes: Sizes, chosen: Tile) -> int:
    """Tiles that all slots have together."""
    return sum(-(-m // chosen.block_m) * -(-n // chosen.width) for m, n, _ in sizes)


def _step(longest: int, reduction: Sequence[int]) -> int:
    """``longest``, its half or its quarter: what reaches least far beyond the channels of a tap."""
    steps = (step for step in (longest, longest // 2, longest // 4) if step >= 16)
    return min(steps, key=lambda step: max(-(-c // step) * (step + _STEP_EXTRA) for c in reduction))


@lru_cache(maxsize=4096)
def _best(
    sizes: tuple[tuple[int, int, int], ...],
    channels: tuple[int, ...] | None,
    dtype: torch.dtype,
    bit_class: BitClass,
    sms: int,
    lean: bool,
    wide: bool,
    table: measured.Table,
) -> Tile:
    narrow = bit_class.gather and any(count % 4 for count in channels or ())
    found = candidates(bit_class, dtype, narrow, lean, wide)
    if channels and not bit_class.step:
        reduction = [k for _, _, k in sizes] if bit_class.gather else channels
        found = tuple(
            dict.fromkeys(
                replace(each, block_k=_step(each.block_k, reduction))
                for each in found
                if each not in _DEEP + _DEEPEST or all(count % each.block_k == 0 for count in reduction)
            )
        )
    entry = None
    if len(set(sizes)) == 1 and dtype.itemsize == 2 and wide:
        entry = table.nearest(bit_class, sizes[0], channels[0] if channels else None, len(sizes), sms)
    known = [] if entry is None else [each for each in found if each in entry.seconds]
    # Of two widths the model expects too much, and other GPUs may lack the memory of the deepest.
    found = tuple(each for each in found if not each.second_n and each not in _DEEPEST)

    def cost(each: Tile) -> float:
        expected = seconds(sizes, each, dtype, bit_class, sms, channels)
        if entry is None or not known:
            return expected
        own = None if entry.channels is None else [entry.channels] * entry.slots
        there = seconds([entry.size] * entry.slots, each, dtype, bit_class, sms, own)
        return entry.seconds[each] * expected / there

    return min(known or found, key=cost)


def tile(
    sizes: Sizes,
    dtype: torch.dtype,
    bit_class: BitClass,
    sms: int,
    *,
    lean: bool = True,
    wide: bool = True,
    settled: bool = True,
    table: measured.Table | None = None,
) -> Tile:
    """The tile of a linear layer's launch, of ``bit_class``; the first of equals.

    Args:
        sizes: (m, n, k) of every slot.
        sms: multiprocessors, of the device or of a cap.
        lean, wide: as for :func:`candidates`.
        settled: tiles of one class were seen to give the same bits on this kind of device. If not, the tile
            is a function of the shape and never of the number of slots: the bits follow from that alone.
        table: measurements instead of those that ship.
    """
    table = measured.shipped() if table is None else table
    if not settled and sizes:
        sizes = [max(sizes, key=math.prod)] * _TYPICAL
    return _best(tuple(sizes), None, dtype, bit_class, sms, lean, wide, table)


def conv_tile(
    sizes: Sizes,
    channels: Sequence[int],
    dtype: torch.dtype,
    bit_class: BitClass,
    sms: int,
    *,
    wide: bool = True,
    settled: bool = True,
    table: measured.Table | None = None,
) -> Tile:
    """As :func:`tile` for a convolution, with steps that do not reach far beyond the channels of a tap.

    Args:
        channels: input channels of every slot.
    """
    table = measured.shipped() if table is None else table
    if not settled and sizes:
        largest = max(zip(sizes, channels, strict=True), key=lambda pair: math.prod(pair[0]))
        sizes, channels = [largest[0]] * _TYPICAL, [largest[1]] * _TYPICAL
    return _best(tuple(sizes), tuple(channels), dtype, bit_class, sms, False, wide, table)


# Pixels by channels of a depthwise convolution: at most as many channels as threads, or the weights of a tap
# would go through shared memory. Narrow loads take twice the registers.
_DEPTHWISE = (
    Tile(32, 64, 16, 4, 1, 4),
    Tile(64, 32, 16, 4, 1, 4),
    Tile(128, 16, 16, 4, 1, 4),
    Tile(16, 64, 16, 4, 1, 7),
    Tile(32, 32, 16, 4, 1, 7),
    Tile(64, 16, 16, 4, 1, 7),
)


def depthwise_candidates(wide: bool = True) -> tuple[Tile, ...]:
    """Every tile of a depthwise convolution; all give the same bits.

    Args:
        wide: pixels are loaded 16 bytes at a time.
    """
    return _DEPTHWISE if wide else tuple(replace(each, programs_per_sm=4) for each in _DEPTHWISE[3:])


@lru_cache(maxsize=4096)
def depthwise_tile(
    sizes: tuple[tuple[int, int, int], ...],
    kernel: tuple[int, int],
    dtype: torch.dtype,
    sms: int,
    wide: bool = True,
) -> Tile:
    """The tile of a depthwise convolution's launch; the first of equals.

    Args:
        sizes: (output pixels, output channels, anything) of every slot.
        kernel: taps along H and along W.
        sms: multiprocessors, of the device or of a cap.
        wide: as for :func:`depthwise_candidates`.
    """

    def cost(each: Tile) -> float:
        return depthwise_seconds(tiles_of(sizes, each), each, dtype, kernel, sms)

    return min(depthwise_candidates(wide), key=cost)

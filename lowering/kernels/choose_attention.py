"""Which attention is ours, and which tile its launch uses: pure functions of shapes, dtype and slots.

As :mod:`choose` does for products: the bit class is a function of the operation's shape and dtype alone, and
the tile moves within it. Keys are always taken in steps of one length in a class, since every step rescales
the sums so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import torch

from torch_mux.lowering.kernels.data import BitClass, Family, Tile, family_of, precision_of
from torch_mux.lowering.kernels.estimate import attention_seconds

__all__ = ["Size", "bit_class", "candidates", "check", "depth", "owned", "padded", "tile"]

#: Longer ones are the vendor's.
MOST_POSITIONS: Final = 16384
#: Up to here ours is as fast as the vendor's that takes masks and float32, which never splits keys.
_SHORT: Final = 257
#: Widest head whose sums a tile can hold in registers, by bytes of an element.
MOST_CHANNELS: Final = {2: 128, 4: 64}
#: Heads that a tile is chosen for where it may not follow the number of slots.
_TYPICAL: Final = 48


@dataclass(frozen=True)
class Size:
    """What one head of an attention measures.

    Attributes:
        queries, keys: positions.
        channels: of a query and a key.
        out_channels: of a value.
    """

    queries: int
    keys: int
    channels: int
    out_channels: int


def owned(size: Size, dtype: torch.dtype, masked: bool = False) -> bool:
    """Whether attention of this shape runs in our kernel; the vendor's has the rest.

    In half precision without a mask PyTorch takes FlashAttention, which splits keys by what batch and heads
    leave idle: alone and in a bundle it gave other bits already for 197 keys of 80 channels. So ours has all
    that it can hold.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    longest = MOST_POSITIONS if half and not masked else _SHORT
    return (
        (half or dtype == torch.float32)
        and 0 < size.queries <= longest
        and 0 < size.keys <= longest
        and min(size.channels, size.out_channels) > 0
        and max(size.channels, size.out_channels) <= MOST_CHANNELS[dtype.itemsize]
    )


def padded(channels: int) -> int:
    """Channels of a block: a power of two that tensor cores take."""
    return max(16, 1 << (channels - 1).bit_length())


def _block(size: Size) -> int:
    return max(padded(size.channels), padded(size.out_channels))


def bit_class(size: Size, dtype: torch.dtype, allow_tf32: bool = False) -> BitClass:
    """The bit class of an attention; its ``step`` is in keys.

    Heads of 64 channels take as many keys a step, and need no other layout between their two products.
    Others have registers for half as many.
    """
    wide = dtype.itemsize == 2 and size.keys > 32 and _block(size) == 64
    return BitClass(Family.WGMMA, precision=precision_of(dtype, allow_tf32), step=64 if wide else 32)


def depth(bit_class: BitClass) -> int:
    """Most channels of a product of queries and keys that are summed before the sum is rounded."""
    return 32 if bit_class.precision == "tf32x3" else max(MOST_CHANNELS.values())


def check(chosen: Tile, bit_class: BitClass) -> None:
    """Raises ValueError where ``chosen`` would give other bits than ``bit_class`` promises."""
    family = family_of(chosen, False)
    if bit_class.family is not family or bit_class.step != chosen.block_k:
        keys = chosen.block_k
        raise ValueError(f"{chosen} takes {keys} keys a step by {family.value}, outside {bit_class}")


#: (queries, warps, buffers, programs that fit a multiprocessor, with a mask) by channels of a block.
_HALF: Final[dict[int, tuple[tuple[int, int, int, int, int], ...]]] = {
    32: ((64, 4, 2, 4, 4), (128, 8, 2, 2, 2)),
    64: ((64, 4, 2, 3, 2), (128, 8, 2, 1, 1)),
    128: ((64, 4, 2, 2, 2), (128, 8, 2, 1, 1)),
}
_FULL: Final = ((64, 4, 2, 2, 2),)


def candidates(
    size: Size, bit_class: BitClass, masked: bool = False, is_causal: bool = False
) -> tuple[Tile, ...]:
    """Every tile of a bit class.

    Args:
        masked: a mask is added, which takes registers.
        is_causal: so does what hides later keys. A tile ends at its last query's key, so a tall one
            multiplies values by zero that a low one does not read: only the lowest is left, or a value that
            is not finite would show.
    """
    known = _HALF[max(32, _block(size))] if bit_class.precision == "ieee" else _FULL
    out, crowded = padded(size.out_channels), masked or is_causal
    found = tuple(
        Tile(rows, out, bit_class.step, warps, stages, less if crowded else fit)
        for rows, warps, stages, fit, less in known
    )
    return found[:1] if is_causal else found


@lru_cache(maxsize=4096)
def tile(
    size: Size,
    heads: int,
    dtype: torch.dtype,
    bit_class: BitClass,
    sms: int,
    masked: bool = False,
    is_causal: bool = False,
    settled: bool = True,
) -> Tile:
    """The tile of a launch, of ``bit_class``; the first of equals.

    Args:
        heads: of all slots together.
        sms: multiprocessors, of the device or of a cap.
        masked, is_causal: as for :func:`candidates`.
        settled: as for :func:`choose.tile`.
    """
    heads, depth = heads if settled else _TYPICAL, padded(size.channels)

    def cost(each: Tile) -> float:
        tiles = heads * -(-size.queries // each.block_m)
        return attention_seconds(tiles, each, size.keys, depth, dtype, bit_class.precision, sms)

    return min(candidates(size, bit_class, masked, is_causal), key=cost)

"""Which chains of convolutions are one launch, and with which tile; imports no Triton.

A chain is a 3 by 3 convolution, the 1 by 1 that adds a residual to it, and the 1 by 1 that reads the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch

from torch_mux.lowering.kernels.data import Tile

__all__ = ["BlockSize", "BlockTile", "fused_on", "owned", "tile", "tiles_of"]


class BlockSize(NamedTuple):
    """What one slot's chain measures.

    Attributes:
        pixels: of all its images.
        channels: into and out of the 3 by 3.
        wide: channels of the sum.
        last: channels of the last result.
    """

    pixels: int
    channels: int
    wide: int
    last: int


@dataclass(frozen=True)
class BlockTile(Tile):
    """A tile of ``block_m`` pixels with all their channels.

    ``block_n`` channels of the sum are made in a step of the second loop, ``block_k`` elements of the 3 by 3
    reduced in a step of the first, which ``stages`` is of.

    Attributes:
        sum_stages: buffers of the second loop's pipeline.
    """

    sum_stages: int = 3


#: By channels of the last result: the fastest at 16 slots of those that an H100 timed at 56 by 56 pixels, and
#: faster than three launches at one slot too.
_TILES: Final = {
    64: BlockTile(64, 32, 64, 4, 4, 3, sum_stages=4),
    128: BlockTile(64, 32, 64, 4, 4, 2, sum_stages=3),
}
_CHANNELS, _WIDE = 64, 256
#: Fewer make too few tiles to be worth a launch that is long for each of them.
_LEAST_PIXELS: Final = 1024


def owned(size: BlockSize, dtype: torch.dtype) -> bool:
    """Whether a chain of this size runs faster as one launch, at one slot as at sixteen.

    With 128 channels at 28 by 28 it does at sixteen only, and then bundles would decide.
    """
    return (
        dtype in (torch.float16, torch.bfloat16)
        and (size.channels, size.wide) == (_CHANNELS, _WIDE)
        and size.last in _TILES
        and size.pixels >= _LEAST_PIXELS
    )


def fused_on(device: torch.device) -> bool:
    """Whether chains are made one launch on ``device``: where that was timed and its bits compared."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def tile(size: BlockSize) -> BlockTile:
    """The tile of a chain that is :func:`owned`."""
    return _TILES[size.last]


def tiles_of(sizes: Sequence[tuple[int, int, int]], chosen: Tile) -> int:
    """Tiles of all slots together.

    Args:
        sizes: (pixels, channels of the sum, channels of the last result) of every slot.
    """
    return sum(-(-pixels // chosen.block_m) for pixels, _, _ in sizes)

"""What launches cost under a cap, by what the tiles were chosen by: measurements, else the analytic model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from torch_mux.lowering.kernels import choose, choose_attention, choose_block
from torch_mux.lowering.kernels.data import Tile
from torch_mux.lowering.kernels.estimate import (
    RATES,
    attention_seconds,
    block_seconds,
    depthwise_seconds,
    seconds,
)
from torch_mux.lowering.kernels.operation import Operation

__all__ = ["JOINED", "KernelCosts", "capped_grid", "smallest_grid"]

#: How much longer one launch for several programs takes than its tiles: it is a plain launch, behind all its
#: members' streams and before them, and one tile fits no member best. Least squares over two mixes that an
#: H100 ran with 45 such launches and without, 1970 against 1856 us and 2672 against 2397 us
#: (``docs/benchmarks/mix-h100-one-lane.json``).
JOINED: Final = 1.12


class KernelCosts:
    """A ``CostModel`` of super-kernels; one launch of several operations costs what their tiles together do.

    Args:
        sms: multiprocessors of the device, which tiles are chosen for.
    """

    def __init__(self, sms: int) -> None:
        self.sms = sms

    def seconds(self, operations: Sequence[Operation], sms: int) -> float:
        """Of one launch that does all of these within ``sms`` multiprocessors."""
        found = _seconds(tuple(operations), sms, self.sms)
        return found if len(operations) == 1 else JOINED * found


@lru_cache(maxsize=1 << 16)
def _seconds(operations: tuple[Operation, ...], sms: int, whole: int) -> float:
    first = operations[0]
    sizes = tuple(size for operation in operations for size in operation.sizes)
    if first.kind in ("linear", "conv") and first.bit_class is not None:
        channels = tuple(count for operation in operations for count in operation.channels)
        if first.kind == "linear":
            tile = choose.tile(sizes, first.dtype, first.bit_class, whole)
        else:
            tile = choose.conv_tile(sizes, channels, first.dtype, first.bit_class, whole)
        return seconds(sizes, tile, first.dtype, first.bit_class, sms, channels or None)
    if first.kind == "block":
        block = choose_block.BlockSize(sizes[0][0], first.channels[0], *sizes[0][1:])
        return block_seconds(block, len(sizes), choose_block.tile(block), first.dtype, sms)
    if first.kind == "depthwise":
        tile = choose.depthwise_tile(sizes, first.taps, first.dtype, whole)
        found = depthwise_seconds(choose.tiles_of(sizes, tile), tile, first.dtype, first.taps, sms)
        return found + _traffic(sizes, first, sms, whole)
    if first.kind == "attention" and first.bit_class is not None:
        (queries, keys, depth), bit_class = sizes[0], first.bit_class
        size = choose_attention.Size(queries, keys, depth, first.channels[0])
        if choose_attention.owned(size, first.dtype):
            tile = choose_attention.tile(size, len(sizes), first.dtype, bit_class, whole)
            tiles, padded = len(sizes) * -(-queries // tile.block_m), choose_attention.padded(depth)
            return attention_seconds(tiles, tile, keys, padded, first.dtype, bit_class.precision, sms)
    return RATES["wgmma"].start + _traffic(sizes, first, sms, whole)


def _traffic(sizes: Sequence[tuple[int, int, int]], operation: Operation, sms: int, whole: int) -> float:
    """Seconds of reading and writing all elements, which a quarter of the device does as fast."""
    nbytes = 2 * operation.dtype.itemsize * sum(m * n for m, n, _ in sizes)
    return nbytes / RATES["wgmma"].memory * max(1.0, whole / (4 * sms))


def smallest_grid(tiles: int, programs: int) -> int:
    """The fewest programs that go through ``tiles`` in as many waves as ``programs`` would."""
    if tiles <= 0:
        return 0
    waves = -(-tiles // max(1, programs))
    return -(-tiles // waves)


def capped_grid(operation: Operation, tile: Tile, grid: int, sms: int) -> int:
    """Programs of a launch that is kept to ``sms`` multiprocessors; of a known number of tiles, the fewest.

    Args:
        operation, tile: of the launch.
        grid: its programs without the cap.
    """
    programs = min(grid, sms * tile.programs_per_sm)
    if operation.kind == "block":
        return smallest_grid(choose_block.tiles_of(operation.sizes, tile), programs)
    if operation.kind not in ("linear", "conv", "depthwise"):
        return programs
    return smallest_grid(choose.tiles_of(operation.sizes, tile), programs)

"""An analytic model of one super-kernel launch: what a tile costs on shapes that nobody measured.

A sum of parts, each a count that follows from the shapes times one constant: steps whose loads wait for
memory, bytes through the port of the busiest multiprocessor, tiles begun and stored, bytes through the
memory, and reads of the one line that the rows behind a matrix's end share. The constants are least squares
over ``docs/benchmarks/kernels-h100.json`` and what the records of split reductions and of families add to it;
``python -m torch_mux.bench.table`` fits them again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from torch_mux.lowering.kernels.choose_block import BlockSize, BlockTile
from torch_mux.lowering.kernels.data import BitClass, Family, Tile, family_of

__all__ = ["RATES", "Rates", "attention_seconds", "block_seconds", "depthwise_seconds", "kind_of", "seconds"]

Sizes = Sequence[tuple[int, int, int]]

_LINE = 128  # bytes


@dataclass(frozen=True)
class Rates:
    """Constants of the model for one kind of launch, as an H100's 132 multiprocessors gave them.

    Attributes:
        start: seconds of a launch without tiles.
        latency: seconds from a load to its use; ``stages - 1`` steps of a pipeline share it.
        begin: seconds of a tile besides its steps and its store.
        load: bytes a second into one multiprocessor.
        store: seconds a byte of a tile's result.
        memory: bytes a second of weights, inputs and outputs together.
        line: seconds of one more read of a line: rows and columns behind the end all read the first one.
        flops: operations a second of one multiprocessor.
        address: seconds a gathered element takes besides its bytes.
    """

    start: float
    latency: float
    begin: float
    load: float
    store: float
    memory: float
    line: float
    flops: float
    address: float = 0.0


_WGMMA = Rates(
    start=1.14e-6, latency=0.21e-6, begin=1.24e-6, load=110e9, store=27e-12, memory=5.6e12,
    line=0.144e-9, flops=4.2e12,
)  # fmt: skip
_MMA = Rates(
    start=2.1e-6, latency=0.4e-6, begin=1.63e-6, load=170e9, store=7.7e-12, memory=4.4e12,
    line=0.031e-9, flops=2.2e12,
)  # fmt: skip
#: By what :func:`kind_of` says. Plain cores (``"fma"``) multiply depthwise convolutions; not fitted.
RATES = {
    "wgmma": _WGMMA,
    "mma": _MMA,
    "fma": replace(_WGMMA, flops=0.375e12),
    "wgmma gather": replace(_WGMMA, latency=0.135e-6, address=46e-12),
    "wgmma narrow": replace(_WGMMA, latency=0.45e-6, address=255e-12),
    "mma gather": replace(_MMA, latency=0.94e-6, address=42e-12),
    "mma narrow": replace(_MMA, latency=0.49e-6, address=160e-12),
}


def kind_of(family: Family, gather: bool, channels: Sequence[int] | None = None) -> str:
    """The key of :data:`RATES`. ``"… narrow"``: pixels are loaded one by one, which no pipeline hides.

    Args:
        family: the multiplying instructions of a tile.
        gather: whether the K axis of a convolution is flattened.
        channels: input channels of every slot of a convolution, None for a linear layer.
    """
    if not gather:
        return family.value
    return f"{family.value} {'narrow' if any(count % 4 for count in channels or ()) else 'gather'}"


def _steps(k: int, channels: int | None, gather: bool, block_k: int) -> int:
    if channels is None or gather:
        return -(-k // block_k)
    return k // channels * -(-channels // block_k)


def _math(tile: Tile, precision: str, rates: Rates) -> float:
    """Seconds of one step's arithmetic: TF32 has half the rate, and true fp32 takes three products."""
    whole = 2.0 * tile.block_m * tile.width * tile.block_k / rates.flops
    return whole * {"ieee": 1.0, "tf32": 2.0, "tf32x3": 6.0}[precision]


def seconds(
    sizes: Sizes,
    tile: Tile,
    dtype: torch.dtype,
    bit_class: BitClass,
    sms: int,
    channels: Sequence[int] | None = None,
    rates: Rates | None = None,
) -> float:
    """Estimated seconds of one launch.

    Args:
        sizes: (m, n, k) of every slot.
        tile: of ``bit_class``, with the programs that one multiprocessor really holds.
        sms: multiprocessors, of the device or of a cap.
        channels: input channels of every slot of a convolution, None for a linear layer.
        rates: instead of those of :data:`RATES`.
    """
    kind = kind_of(family_of(tile, bit_class.swap), bit_class.gather, channels)
    rates = RATES[kind] if rates is None else rates
    width = dtype.itemsize
    depth = 1 if kind.endswith("narrow") else max(1, tile.stages - 1)
    loads = (tile.block_m + tile.width) * tile.block_k * width / rates.load
    step = max(loads, _math(tile, bit_class.precision, rates))
    step += rates.address * tile.block_m * tile.block_k
    store = rates.store * tile.block_m * tile.width * width
    widths: Sequence[int | None] = channels if channels else [None] * len(sizes)
    slots = Counter(zip(sizes, widths, strict=True))
    each = {slot: -(-slot[0][0] // tile.block_m) * -(-slot[0][1] // tile.width) for slot in slots}
    tiles = sum(count * each[slot] for slot, count in slots.items())
    if tiles == 0:
        return rates.start
    resident = min(tiles, sms * tile.programs_per_sm)
    waits, longest, work, traffic, shared = 0.0, 0.0, 0.0, 0.0, 0.0
    for slot, count in slots.items():
        (m, n, k), c = slot
        steps = _steps(k, c, bit_class.gather, tile.block_k)
        wait = steps * rates.latency / depth + rates.begin
        longest = max(longest, wait)
        waits += count * each[slot] * wait
        work += count * each[slot] * (steps * step + store)
        traffic += count * width * (n * k + m * (k if c is None else c) + m * n)
        down, across = -(-m // tile.block_m), -(-n // tile.width)
        behind = (down * tile.block_m - m) * across + (across * tile.width - n) * down
        at_once = max(1.0, min(len(sizes), resident / max(1, each[slot])))
        shared += 0.0 if bit_class.gather else count * behind * k * width / _LINE / at_once
    rounds, busiest = -(-tiles // resident), -(-tiles // sms)
    return (
        rates.start
        + max(longest, rounds * waits / tiles)
        + busiest * work / tiles
        + traffic / rates.memory
        + rates.line * shared
    )


def depthwise_seconds(tiles: int, tile: Tile, dtype: torch.dtype, kernel: tuple[int, int], sms: int) -> float:
    """Estimated seconds of one depthwise launch, but for the traffic that is the same with every tile.

    Args:
        tiles: of all slots together.
        kernel: taps along H, whose loads wait for each other, and along W.
        sms: multiprocessors, of the device or of a cap.
    """
    rates, area = RATES["fma"], tile.block_m * tile.block_n * dtype.itemsize
    rounds, busiest = -(-tiles // max(1, min(tiles, sms * tile.programs_per_sm))), -(-tiles // sms)
    work = kernel[0] * kernel[1] * area / rates.load + area * rates.store
    return rates.start + rounds * (rates.begin + kernel[0] * rates.latency) + busiest * work


def block_seconds(size: BlockSize, slots: int, tile: BlockTile, dtype: torch.dtype, sms: int) -> float:
    """Estimated seconds of one launch of a chain of three convolutions.

    Args:
        size: of every slot.
        tile: a block of pixels with all their channels.
        sms: multiprocessors, of the device or of a cap.
    """
    rates, width = RATES["wgmma"], dtype.itemsize
    tiles = slots * -(-size.pixels // tile.block_m)
    if tiles == 0:
        return rates.start
    steps, wide_steps = 9 * size.channels // tile.block_k, size.wide // tile.block_n
    wait = rates.begin + rates.latency * (
        steps / max(1, tile.stages - 1) + wide_steps / max(1, tile.sum_stages - 1)
    )
    loads = steps * (tile.block_m + size.channels) * tile.block_k
    loads += size.wide * (size.channels + tile.block_m + size.last)
    weights = 9 * size.channels**2 + size.wide * (size.channels + size.last)
    busy = max(width * loads / rates.load, 2.0 * tile.block_m * weights / rates.flops)
    stored = tile.block_m * (size.wide + size.last)
    traffic = slots * (weights + size.pixels * (size.channels + 2 * size.wide + size.last))
    rounds, busiest = -(-tiles // (sms * tile.programs_per_sm)), -(-tiles // sms)
    return (
        rates.start
        + rounds * wait
        + busiest * (busy + rates.store * stored * width)
        + width * traffic / rates.memory
    )


def attention_seconds(
    tiles: int, tile: Tile, keys: int, depth: int, dtype: torch.dtype, precision: str, sms: int
) -> float:
    """Estimated seconds of one attention launch, but for the traffic that is the same with every tile.

    Args:
        tiles: of all slots together, ``tile.block_m`` queries of one head each.
        tile: ``block_k`` keys a step, ``block_n`` channels of a value.
        depth: channels of a key.
        sms: multiprocessors, of the device or of a cap.
    """
    rates = RATES[family_of(tile, False).value]
    steps = -(-keys // tile.block_k)
    channels, width = depth + tile.block_n, dtype.itemsize
    loads = tile.block_k * channels * width / rates.load
    product = replace(tile, block_n=channels)
    work = steps * max(loads, _math(product, precision, rates))
    work += tile.block_m * (depth * width / rates.load + tile.block_n * width * rates.store)
    rounds, busiest = -(-tiles // max(1, min(tiles, sms * tile.programs_per_sm))), -(-tiles // sms)
    return rates.start + rounds * (rates.begin + steps * rates.latency) + busiest * work

"""The measured table on disk: what each tile took on the layers of common models, on one device.

``measured.json`` beside this file is made from the kernel benchmark by ``python -m torch_mux.bench.table``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch_mux.lowering.kernels.data import BitClass, Tile

__all__ = ["Entry", "Table", "dump", "parse", "shipped", "words_of"]

#: How much a size may differ from a measured one. It is small because tiles come in whole numbers: with one
#: shape at a time left out, its neighbours at a ratio of 1.5 and more predict worse than the analytic model.
RATIO = 1.125


@dataclass(frozen=True)
class Entry:
    """What the tiles of one bit class took on one shape.

    Attributes:
        bit_class: what the tiles have in common.
        size: (m, n, k) of every slot.
        channels: input channels of a convolution, None for a linear layer.
        slots: how many slots the launch had.
        seconds: by tile.
    """

    bit_class: BitClass
    size: tuple[int, int, int]
    channels: int | None
    slots: int
    seconds: Mapping[Tile, float]

    @property
    def kind(self) -> tuple[bool, bool]:
        """What launches must agree in to be compared."""
        return _kind(self.channels)

    def ratio(self, size: tuple[int, int, int], slots: int) -> float:
        """The largest ratio between one of this entry's sizes, or its slots, and what was asked for."""
        pairs = zip((*self.size, self.slots), (*size, slots), strict=True)
        return max(max(own, other) / max(1, min(own, other)) for own, other in pairs)


@dataclass(frozen=True, eq=False)
class Table:
    """Measurements of half-precision launches on one device.

    Attributes:
        device: its architecture, such as ``"sm_90"``.
        multiprocessors: how many it has; the table says nothing of launches on fewer or more.
    """

    device: str
    multiprocessors: int
    entries: tuple[Entry, ...]

    def nearest(
        self, bit_class: BitClass, size: tuple[int, int, int], channels: int | None, slots: int, sms: int
    ) -> Entry | None:
        """The entry closest to a launch of equal slots, or None where none is within :data:`RATIO`."""
        if sms != self.multiprocessors:
            return None
        alike = [
            each
            for each in self.entries
            if each.bit_class == bit_class
            and each.kind == _kind(channels)
            and each.ratio(size, slots) <= RATIO
        ]
        return min(alike, key=lambda each: each.ratio(size, slots), default=None)


def _kind(channels: int | None) -> tuple[bool, bool]:
    """Whether it is a linear layer, and whether pixels that are gathered are loaded one by one."""
    return channels is None, channels is not None and channels % 4 != 0


def _tile(words: str) -> Tile:
    block, warps, stages, programs, *swap = words.split()
    m, wide, k = block.split("x")
    n, _, second = wide.partition("+")
    w, s, p = (int(count[1:]) for count in (warps, stages, programs))
    return Tile(int(m), int(n), int(k), w, s, p, int(second or 0), bool(swap))


def words_of(tile: Tile) -> str:
    """How tables name a tile: its sides, warps, stages, programs a multiprocessor and ``swap`` if it does."""
    wide = f"{tile.block_n}+{tile.second_n}" if tile.second_n else f"{tile.block_n}"
    block = f"{tile.block_m}x{wide}x{tile.block_k}"
    swap = " swap" if tile.swap else ""
    return f"{block} w{tile.warps} s{tile.stages} p{tile.programs_per_sm}{swap}"


def _entry(record: Mapping[str, Any]) -> Entry:
    m, n, k = record["size"]
    return Entry(
        BitClass(None, gather=record["gather"]),
        (m, n, k),
        record["channels"],
        record["slots"],
        {_tile(words): value * 1e-6 for words, value in record["microseconds"].items()},
    )


def parse(text: str) -> Table:
    """The table in ``text``, which :func:`dump` wrote."""
    content = json.loads(text)
    return Table(content["device"], content["multiprocessors"], tuple(map(_entry, content["launches"])))


def dump(table: Table) -> str:
    """``table`` as JSON, a launch a line; only classes of half precision that do not swap."""
    lines = [
        json.dumps(
            {
                "gather": each.bit_class.gather,
                "size": each.size,
                "channels": each.channels,
                "slots": each.slots,
                "microseconds": {words_of(tile): round(took * 1e6, 2) for tile, took in each.seconds.items()},
            }
        )
        for each in table.entries
    ]
    head = f'"device": {json.dumps(table.device)}, "multiprocessors": {table.multiprocessors}'
    return f'{{{head}, "launches": [\n' + ",\n".join(lines) + "\n]}\n"


@cache
def shipped() -> Table:
    """The table beside this file."""
    return parse(Path(__file__).with_name("measured.json").read_text())

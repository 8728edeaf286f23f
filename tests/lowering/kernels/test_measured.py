"""The measured table: it is read as written, and silent on what was not measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from torch_mux.bench.table import merged, table_of
from torch_mux.lowering.kernels import choose, measured
from torch_mux.lowering.kernels.data import BitClass, Family, Tile
from torch_mux.lowering.kernels.measured import Entry, Table

FOLDER = Path(__file__).parents[3] / "docs" / "benchmarks"
NUMBERS = [
    FOLDER / name
    for name in (
        "kernels-h100.json",
        "kernels-split-h100.json",
        "kernels-families-h100.json",
        "kernels-epilogue-h100.json",
        "kernels-conv-h100.json",
        "kernels-rows-h100.json",
    )
]
ANY, GATHER = BitClass(None), BitClass(None, gather=True)
TILE = Tile(64, 64, 64, 4, 4, 3)


def entry(size: tuple[int, int, int], channels: int | None = None, slots: int = 16) -> Entry:
    own = GATHER if channels is not None and channels < 64 else ANY
    return Entry(own, size, channels, slots, {TILE: 4e-6})


def test_the_table_that_ships_is_that_of_the_committed_numbers() -> None:
    shipped = Path(measured.__file__).with_name("measured.json").read_text()
    assert shipped == measured.dump(table_of(merged([json.loads(path.read_text()) for path in NUMBERS])))


def test_every_entry_is_of_its_class_and_has_several_tiles() -> None:
    table = measured.shipped()
    assert (table.device, table.multiprocessors) == ("sm_90", 132)
    assert {each.slots for each in table.entries} >= {1, 16}
    for each in table.entries:
        narrow = each.bit_class.gather and each.channels is not None and each.channels % 4 != 0
        allowed = choose.candidates(each.bit_class, torch.float16, narrow, each.channels is None)
        assert len(each.seconds) >= 2
        assert set(each.seconds) <= set(allowed)
        assert all(1e-6 < took < 1e-3 for took in each.seconds.values())


def test_written_and_read_again() -> None:
    two = Entry(
        ANY,
        (197, 768, 768),
        None,
        16,
        {TILE: 4e-6, replace(TILE, second_n=32): 8e-6, replace(TILE, swap=True): 9e-6},
    )
    table = Table("sm_90", 132, (entry((128, 64, 64)), entry((128, 64, 147), 3), two))
    assert "64x64+32x64 w4 s4 p3" in measured.dump(table)
    again = measured.parse(measured.dump(table))
    assert (again.device, again.multiprocessors, again.entries) == ("sm_90", 132, table.entries)


def test_the_nearest_of_those_within_the_ratio() -> None:
    near, nearer = entry((128, 100, 768)), entry((128, 104, 768))
    table = Table("sm_90", 132, (near, nearer))
    assert table.nearest(ANY, (128, 103, 768), None, 16, 132) is nearer
    assert table.nearest(ANY, (128, 100, 768), None, 17, 132) is near
    assert table.nearest(ANY, (128, 100, 768), None, 19, 132) is None
    assert table.nearest(ANY, (150, 100, 768), None, 16, 132) is None
    assert table.nearest(ANY, (128, 100, 768), None, 16, 66) is None
    assert table.nearest(BitClass(Family.MMA), (128, 100, 768), None, 16, 132) is None


def test_kernels_are_not_confused() -> None:
    narrow, wide, linear = entry((784, 64, 192), 3), entry((784, 64, 192), 4), entry((784, 64, 192))
    table = Table("sm_90", 132, (narrow, wide, linear))
    assert table.nearest(GATHER, (784, 64, 192), 5, 16, 132) is narrow
    assert table.nearest(GATHER, (784, 64, 192), 8, 16, 132) is wide
    assert table.nearest(ANY, (784, 64, 192), None, 16, 132) is linear
    assert table.nearest(ANY, (784, 64, 192), 192, 16, 132) is None

"""Heuristics: the class follows the operation alone, the tile stays within it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_mux.bench.table import Measurement, chosen, merged, read, totals
from torch_mux.lowering.kernels import choose, measured
from torch_mux.lowering.kernels.data import BitClass, Family, Tile, family_of
from torch_mux.lowering.kernels.estimate import RATES

HALF = torch.float16
MOST = 1 << 17  # bytes of shared memory that all but the deepest tiles stay below
SIZE = st.integers(1, 5000)
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


@pytest.fixture(scope="module")
def measurements() -> list[Measurement]:
    """What an H100 took for every tile of the layers of ResNet-50, BERT, ViT and one vector by matrix."""
    return read(merged([json.loads(path.read_text()) for path in NUMBERS]))


@given(m=SIZE, n=SIZE, k=SIZE, slots=st.integers(1, 64), sms=st.sampled_from([1, 8, 66, 132]))
def test_no_number_of_slots_changes_the_class(m: int, n: int, k: int, slots: int, sms: int) -> None:
    for dtype in (HALF, torch.bfloat16, torch.float32):
        for tf32 in (False, True):
            alone = choose.linear_class([(m, n, k)], dtype, tf32)
            assert choose.linear_class([(m, n, k)] * slots, dtype, tf32) == alone
            tile = choose.tile([(m, n, k)] * slots, dtype, alone, sms)
            choose.check(tile, alone)
            assert alone.family in (family_of(tile, alone.swap), None)


@given(
    m=SIZE, channels=st.integers(1, 600), taps=st.sampled_from([1, 9, 49]), slots=st.integers(1, 64),
)  # fmt: skip
def test_convolutions_as_well(m: int, channels: int, taps: int, slots: int) -> None:
    sizes = [(m, 64, taps * channels)]
    alone = choose.conv_class(sizes, [channels], taps, HALF, False)
    assert choose.conv_class(sizes * slots, [channels] * slots, taps, HALF, False) == alone
    assert alone.gather == (taps > 1 and channels < 64)
    tile = choose.conv_tile(sizes * slots, [channels] * slots, HALF, alone, 132)
    choose.check(tile, alone)
    assert tile.block_k % 16 == 0


def test_classes() -> None:
    assert choose.linear_class([(16, 64, 64), (17, 64, 64)], HALF) == BitClass(None)
    assert choose.linear_class([(16, 64, 64)], torch.float32, True) == BitClass(Family.MMA, precision="tf32")
    assert choose.linear_class([(17, 64, 64)], torch.float32) == BitClass(
        Family.WGMMA, precision="tf32x3", step=32
    )
    assert choose.conv_class([(784, 64, 144)], [16], 9, torch.float32, False).step == 32
    assert choose.conv_class([(784, 64, 16)], [16], 1, torch.float32, False).step == 16
    with pytest.raises(ValueError, match="share a bit class"):
        choose.conv_class([(784, 64, 16), (784, 64, 64)], [16, 64], 1, torch.float32, False)
    assert choose.linear_class([(17, 64, 64)], torch.float32, True) == BitClass(
        Family.WGMMA, precision="tf32"
    )
    with pytest.raises(ValueError, match="share a bit class"):
        choose.linear_class([(16, 64, 64), (17, 64, 64)], torch.float32)


@pytest.mark.parametrize("table", [measured.shipped(), measured.Table("sm_90", 132, ())])
def test_the_number_of_slots_decides_the_instructions(table: measured.Table) -> None:
    size = (49, 512, 4608)
    own = choose.conv_class([size], [512], 9, HALF, False)
    assert own == BitClass(None)
    for slots, family in ((1, Family.MMA), (16, Family.WGMMA)):
        tile = choose.conv_tile([size] * slots, [512] * slots, HALF, own, 132, table=table)
        assert family_of(tile, False) is family


def test_family_follows_the_tall_side() -> None:
    assert family_of(Tile(64, 32, 64, 4, 3, 1), False) is Family.WGMMA
    assert family_of(Tile(32, 64, 64, 4, 3, 1), False) is Family.MMA
    assert family_of(Tile(32, 64, 64, 4, 3, 1), True) is Family.WGMMA
    assert family_of(Tile(64, 64, 64, 2, 3, 1), False) is Family.MMA


def test_a_tile_outside_the_class_is_refused() -> None:
    wgmma = BitClass(Family.WGMMA)
    with pytest.raises(ValueError, match="outside"):
        choose.check(Tile(32, 64, 64, 4, 3, 1), wgmma)
    with pytest.raises(ValueError, match="outside"):
        choose.check(Tile(64, 64, 24, 4, 3, 1), wgmma)
    with pytest.raises(ValueError, match="outside"):  # another step rounds at other places
        choose.check(Tile(64, 64, 64, 4, 3, 1), replace(wgmma, precision="tf32x3", step=32))


CLASSES = [(HALF, "ieee", 0), (torch.float32, "tf32", 0), (torch.float32, "tf32x3", 32)]


@pytest.mark.parametrize("family", list(Family))
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(("dtype", "precision", "step"), CLASSES)
@pytest.mark.parametrize("lean", [False, True])
def test_every_candidate_is_of_its_class(
    family: Family, swap: bool, dtype: torch.dtype, precision: str, step: int, lean: bool
) -> None:
    bit_class = BitClass(family, swap, precision=precision, step=step)
    found = choose.candidates(bit_class, dtype, lean=lean)
    assert len(set(found)) == len(found) >= 4
    for tile in found:
        choose.check(tile, bit_class)


def test_one_slot_spreads_and_many_slots_use_large_tiles() -> None:
    wgmma = BitClass(Family.WGMMA)
    alone = choose.tile([(197, 768, 768)], HALF, wgmma, 132)
    together = choose.tile([(197, 3072, 768)] * 16, HALF, wgmma, 132)
    assert choose.tiles_of([(197, 768, 768)], alone) >= 40
    assert together.block_m * together.block_n > alone.block_m * alone.block_n


def check_distance(ratios: dict[tuple[str, int], float], alone: float) -> None:
    assert {model for model, _ in ratios} == {"resnet50", "bert", "vit", "gemv"}
    assert {slots for _, slots in ratios} == {1, 16}
    for (model, slots), ratio in ratios.items():
        assert 1.0 <= ratio < (alone if slots == 1 else 1.07), (model, slots)


def test_models_take_hardly_longer_than_with_the_best_tiles(measurements: list[Measurement]) -> None:
    check_distance(totals(measurements, lambda each: chosen(each, 132)), 1.02)


def test_so_do_models_whose_shapes_were_never_measured(measurements: list[Measurement]) -> None:
    shipped = measured.shipped()

    def without(each: Measurement) -> Tile:
        others = tuple(entry for entry in shipped.entries if entry.size != each.shape)
        tile = chosen(each, 132, replace(shipped, entries=others))
        if not tile.swap or tile in each.microseconds:
            return tile
        left = [
            other for other in each.tiles() if not other.second_n
        ]  # the record is older than tiles that swap
        kind = {other: RATES[each.kind(other)] for other in left}
        return min(left, key=lambda other: each.expected(other, kind[other], 132))

    check_distance(totals(measurements, without), 1.2)


def test_the_table_decides_where_it_holds_the_shape() -> None:
    size, own = (300, 700, 500), BitClass(Family.WGMMA)
    slow = choose.tile([size], HALF, own, 132, table=measured.Table("sm_90", 132, ()))
    other = next(each for each in choose.candidates(own, HALF) if each != slow)
    entry = measured.Entry(own, size, None, 1, {slow: 5e-6, other: 3e-6})
    table = measured.Table("sm_90", 132, (entry,))
    assert choose.tile([size], HALF, own, 132, table=table) == other
    assert choose.tile([(310, 700, 500)], HALF, own, 132, table=table) == other
    empty = measured.Table("sm_90", 132, ())
    for sizes, sms in (([size], 66), ([size] * 4, 132), ([(400, 700, 500)], 132), ([size, size], 132)):
        found = choose.tile(sizes, HALF, own, sms, table=table)
        assert found == choose.tile(sizes, HALF, own, sms, table=empty)
    full = BitClass(Family.WGMMA, precision="tf32")
    found = choose.tile([size], torch.float32, full, 132, table=table)
    assert found == choose.tile([size], torch.float32, full, 132, table=empty)
    assert choose.tile([size], HALF, own, 132, wide=False, table=table).programs_per_sm <= 2


def test_tiles_of_two_widths_are_taken_where_they_were_measured() -> None:
    size, own = (197, 768, 3072), BitClass(None)
    (two,) = (each for each in choose.candidates(own, HALF) if each.second_n)
    other = choose.tile([size] * 16, HALF, own, 132, table=measured.Table("sm_90", 132, ()))
    for faster in (two, other):
        took = {two: 5e-6, other: 5e-6, faster: 4e-6}
        table = measured.Table("sm_90", 132, (measured.Entry(own, size, None, 16, took),))
        assert choose.tile([size] * 16, HALF, own, 132, table=table) == faster
    assert choose.tiles_of([(129, 97, 8)], two) == 4
    table = measured.Table("sm_90", 132, ())
    for m in (64, 128, 197, 512):
        for slots in (1, 4, 16):
            assert not choose.tile([(m, 768, 768)] * slots, HALF, own, 132, table=table).second_n


def test_the_deepest_tiles_are_taken_where_they_were_measured() -> None:
    size, own = (196, 256, 2304), BitClass(None)
    deepest = [each for each in choose.candidates(own, HALF, lean=False) if held(each) > MOST]
    assert deepest and not [
        each for each in choose.candidates(own, torch.float32, lean=False) if held(each, 4) > MOST
    ]
    for deep in deepest:
        table = measured.Table("sm_90", 132, (measured.Entry(own, size, 256, 16, {deep: 5e-6}),))
        assert choose.conv_tile([size] * 16, [256] * 16, HALF, own, 132, table=table) == deep
        for sms, slots in ((108, 16), (132, 4)):
            other = choose.conv_tile([size] * slots, [256] * slots, HALF, own, sms, table=table)
            assert held(other) <= MOST  # what a program may have where the table says nothing


def held(tile: Tile, itemsize: int = 2) -> int:
    """Bytes of shared memory that the pipeline of a program takes."""
    return (tile.block_m + tile.width) * tile.block_k * tile.stages * itemsize


def test_few_rows_of_few_slots_lie_on_the_n_side() -> None:
    own, empty = BitClass(None), measured.Table("sm_90", 132, ())
    for table in (measured.shipped(), empty):
        for size in ((197, 768, 768), (197, 768, 3072), (197, 2304, 768)):
            assert choose.tile([size], HALF, own, 132, table=table).swap
            assert not choose.tile([size] * 16, HALF, own, 132, table=table).swap
    for options in ({"lean": False}, {"dtype": torch.float32}):
        named: dict[str, Any] = {"dtype": HALF, "sms": 132, **options}
        bit_class = choose.linear_class([(197, 768, 768)], named["dtype"])
        assert not choose.tile([(197, 768, 768)], bit_class=bit_class, **named).swap


def test_slots_of_different_sizes_have_a_tile_in_common() -> None:
    own, large, small = BitClass(Family.WGMMA), (4096, 4096, 768), (64, 64, 768)
    assert choose.tile([large] * 8, HALF, own, 132).block_m == 128
    narrow = choose.tile([small] * 8, HALF, own, 132)
    assert narrow.block_m * narrow.block_n < 64 * 64
    assert choose.tile([*[large] * 8, small], HALF, own, 132) == choose.tile([large] * 8, HALF, own, 132)


def test_fewer_programs_where_registers_may_run_out() -> None:
    own = BitClass(Family.WGMMA)
    lean, other = choose.candidates(own, HALF), choose.candidates(own, HALF, lean=False)
    assert set(lean) - set(other) and max(each.programs_per_sm for each in set(other) - set(lean)) == 2
    assert max(each.programs_per_sm for each in other) == 4
    split = BitClass(Family.WGMMA, precision="tf32x3", step=32)
    for bit_class, dtype in ((own, HALF), (BitClass(Family.MMA), HALF), (split, torch.float32)):
        for tile in choose.candidates(bit_class, dtype, wide=False):
            assert tile.programs_per_sm * tile.warps * 32 * 255 <= 65536


def test_no_slot_at_all_has_a_tile() -> None:
    assert choose.tile([], HALF, BitClass(Family.WGMMA), 132) in choose.candidates(
        BitClass(Family.WGMMA), HALF
    )
    assert choose.conv_tile([], [], HALF, BitClass(Family.WGMMA), 132).block_k % 16 == 0


def test_steps_fit_the_channels_of_a_tap() -> None:
    sizes, wgmma = [(784, 96, 9 * 96)], BitClass(Family.WGMMA)
    assert choose.conv_tile(sizes, [96], HALF, wgmma, 132).block_k == 32
    assert choose.conv_tile([(784, 128, 9 * 128)] * 16, [128] * 16, HALF, wgmma, 132).block_k == 64


def test_many_bytes_are_under_way_for_one_slot_of_few_pixels() -> None:
    size, wgmma = (196, 256, 2304), BitClass(Family.WGMMA)
    alone = choose.conv_tile([size], [256], HALF, wgmma, 132)
    assert (alone.block_k, alone.stages) == (128, 4)
    assert choose.conv_tile([size] * 16, [256] * 16, HALF, wgmma, 132) != alone


def test_tiles_are_counted_per_slot() -> None:
    tile = Tile(64, 64, 64, 4, 3, 1)
    assert choose.tiles_of([(64, 64, 8), (65, 64, 8), (1, 129, 8), (0, 64, 8)], tile) == 1 + 2 + 3


@given(m=SIZE, n=SIZE, slots=st.integers(1, 64), sms=st.sampled_from([1, 8, 132]), wide=st.booleans())
def test_depthwise_tiles(m: int, n: int, slots: int, sms: int, wide: bool) -> None:
    tile = choose.depthwise_tile(((m, n, 9),) * slots, (3, 3), HALF, sms, wide)
    assert tile in choose.depthwise_candidates(wide)


def test_depthwise_tiles_follow_the_shape() -> None:
    def tile(slots: int, pixels: int, channels: int) -> Tile:
        return choose.depthwise_tile(((pixels, channels, 9),) * slots, (3, 3), HALF, 132)

    assert tile(16, 112 * 112, 16).block_n == 16  # wider tiles would be empty for the most part
    assert tile(16, 49, 960).block_m <= 32  # few pixels: as many tiles as fill the device
    small, large = tile(1, 196, 240), tile(64, 56 * 56, 192)
    assert small.block_m * small.block_n < large.block_m * large.block_n


@given(m=SIZE, n=SIZE, k=SIZE, slots=st.integers(1, 64))
def test_where_no_class_was_established_the_tile_follows_the_shape_alone(
    m: int, n: int, k: int, slots: int
) -> None:
    size = (m, n, k)
    for dtype in (HALF, torch.float32):
        own = choose.linear_class([size], dtype)
        alone = choose.tile([size], dtype, own, 108, settled=False)
        assert choose.tile([size] * slots, dtype, own, 108, settled=False) == alone
    conv = choose.conv_class([(m, n, 9 * k)], [k], 9, HALF, False)
    alone = choose.conv_tile([(m, n, 9 * k)], [k], HALF, conv, 108, settled=False)
    assert choose.conv_tile([(m, n, 9 * k)] * slots, [k] * slots, HALF, conv, 108, settled=False) == alone

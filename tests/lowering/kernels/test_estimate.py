"""The analytic model: more work, fewer multiprocessors and wasted rows cost more."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_mux.lowering.kernels import choose
from torch_mux.lowering.kernels.data import BitClass, Family, Tile
from torch_mux.lowering.kernels.estimate import RATES, kind_of, seconds

HALF = torch.float16
WGMMA = BitClass(Family.WGMMA)
TILE = Tile(64, 64, 64, 4, 4, 3)


@given(
    m=st.integers(1, 3000), n=st.integers(1, 3000), k=st.integers(1, 5000), slots=st.integers(1, 32),
    sms=st.integers(1, 131),
)  # fmt: skip
def test_more_slots_and_fewer_multiprocessors_are_not_faster(
    m: int, n: int, k: int, slots: int, sms: int
) -> None:
    for tile in choose.candidates(WGMMA, HALF):
        took = seconds([(m, n, k)] * slots, tile, HALF, WGMMA, 132)
        assert took > RATES["wgmma"].start
        assert seconds([(m, n, 2 * k)] * slots, tile, HALF, WGMMA, 132) > took
        assert seconds([(m, n, k)] * slots, tile, HALF, WGMMA, sms) >= took * 0.999


def test_a_step_waits_less_with_more_of_them_in_flight() -> None:
    sizes = [(64, 64, 6400)]
    three, five = (seconds(sizes, Tile(64, 64, 64, 4, stages, 2), HALF, WGMMA, 132) for stages in (3, 5))
    assert three - five == pytest.approx(100 * RATES["wgmma"].latency * (1 / 2 - 1 / 4))


def test_rows_behind_the_end_cost_what_their_shared_line_takes() -> None:
    whole, part = (seconds([(m, 640, 640)], TILE, HALF, WGMMA, 132) for m in (128, 100))
    traffic = 28 * (640 + 640) * 2 / RATES["wgmma"].memory
    assert part - whole == pytest.approx(28 * 10 * 10 * RATES["wgmma"].line - traffic)


def test_channels_that_do_not_fill_a_step_cost_whole_steps() -> None:
    size = (784, 96, 9 * 96)
    taps, flat = (seconds([size], TILE, HALF, WGMMA, 132, channels) for channels in ([96], [864]))
    assert taps > flat


def test_kinds() -> None:
    assert kind_of(Family.WGMMA, False) == kind_of(Family.WGMMA, False, [3]) == "wgmma"
    for family in Family:
        kinds = [kind_of(family, True, each) for each in ([4, 8], [4, 3])]
        assert kinds == [f"{family.value} gather", f"{family.value} narrow"]
    assert kind_of(Family.MMA, False) == "mma"


def test_unequal_slots_lie_between_equal_ones() -> None:
    small, large = (64, 640, 640), (640, 640, 640)
    low, mixed, high = (
        seconds(sizes, TILE, HALF, WGMMA, 132) for sizes in ([small] * 8, [small, large] * 4, [large] * 8)
    )
    assert low < mixed < high


def test_nothing_to_do_costs_a_launch() -> None:
    assert seconds([], TILE, HALF, WGMMA, 132) == RATES["wgmma"].start
    assert seconds([(0, 64, 64)], TILE, HALF, WGMMA, 132) == RATES["wgmma"].start


def test_fp32_takes_longer() -> None:
    sizes = [(512, 512, 512)] * 16
    half, *full = (
        seconds(sizes, TILE, dtype, BitClass(Family.WGMMA, precision=precision), 132)
        for dtype, precision in ((HALF, "ieee"), (torch.float32, "tf32"), (torch.float32, "tf32x3"))
    )
    assert half < full[0] < full[1]

"""The super-kernel of a chain of convolutions in Triton's interpreter: float64, and three launches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from torch_mux.lowering.kernels import reference
from torch_mux.lowering.kernels.block import block, block_launch
from torch_mux.lowering.kernels.choose_block import BlockTile
from torch_mux.lowering.kernels.conv import conv
from torch_mux.lowering.kernels.data import Tile, Vector

pytestmark = pytest.mark.interpreter
HALF = torch.float16
SHAPES = [(3, 3, 64, 64), (1, 1, 256, 64), (1, 1, 64, 256)]
TILE = BlockTile(64, 32, 64, 4, 2, 2)


class Chain:
    """Operands of ``slots`` slots with two images of 7 by 9 pixels each, for the rows of a table of three."""

    def __init__(self, tools: Any, last: int, rows: list[int], scaled: bool = True) -> None:
        kernels = [*SHAPES[:2], (1, 1, last, 256)]
        self.rows = torch.tensor(rows)
        self.x = tools.guarded(torch.randn(len(rows), 2, 7, 9, 64).to(HALF))
        self.residual = tools.guarded(torch.randn(len(rows), 2, 7, 9, 256).to(HALF))
        self.weights = [
            [tools.guarded((torch.randn(o, kh, kw, c) / (kh * kw * c) ** 0.5).to(HALF)) for _ in range(3)]
            for kh, kw, o, c in kernels
        ]
        self.table = torch.tensor(
            [[0, *(w.data_ptr() for w in row)] for row in zip(*self.weights, strict=True)]
        )
        offsets = [0, 64, 64 + 256]
        self.arena = torch.randn(3, 2 * 512)
        self.shifts = [Vector(self.arena, offset) for offset in offsets]
        self.scales = [Vector(self.arena, 512 + offset) for offset in offsets] if scaled else None
        self.results = [torch.full((len(rows), 2, 7, 9, n), 7.0, dtype=HALF) for n in (256, last)]

    def run(self, control: Tensor, chosen: slice = slice(None), sms: int = 2) -> list[Tensor]:
        results = [torch.full_like(each[chosen], 7.0) for each in self.results]
        block(
            self.x[chosen], self.table, [1, 2, 3], self.rows[chosen], control, *results,
            residual=self.residual[chosen], scales=self.scales, shifts=self.shifts, tile=TILE, sms=sms,
        )  # fmt: skip
        return results

    def apart(self, control: Tensor) -> list[Tensor]:
        """By three launches whose tiles multiply matrices of the same sizes."""
        outs = [torch.empty(*self.x.shape[:-1], n, dtype=HALF) for n in (64, 256, self.results[1].shape[-1])]
        tiles = [
            Tile(64, 64, 64, 4, 2, 2),
            Tile(64, 32, 64, 4, 2, 2),
            Tile(64, outs[2].shape[-1], 32, 4, 2, 2),
        ]
        sources, addends = [self.x, *outs], (None, self.residual, None)
        for index, (tile, taps) in enumerate(zip(tiles, (3, 1, 1), strict=True)):
            scale = None if self.scales is None else self.scales[index]
            conv(
                sources[index], self.table, index + 1, self.rows, control, outs[index], kernel=(taps, taps),
                padding=(taps // 2, taps // 2), scale=scale, shift=self.shifts[index],
                residual=addends[index], activation="relu", tile=tile, sms=2,
            )  # fmt: skip
        return outs[1:]

    def reference(self) -> list[Tensor]:
        """In float64, rounded to half precision where a launch would."""
        vectors: dict[str, Any] = {}
        results, xs = [], list(self.x)
        for index, weights in enumerate(self.weights):
            for name, found in (("scales", self.scales), ("shifts", self.shifts)):
                if found is not None:
                    at, n = found[index].offset, weights[0].shape[0]
                    vectors[name] = list(self.arena[self.rows, at : at + n])
            added = list(self.residual) if index == 1 else None
            wide = reference.conv(
                xs, [weights[row] for row in self.rows.tolist()], **vectors, activation="relu",
                padding=(1, 1) if index == 0 else (0, 0), residuals=added,
            )  # fmt: skip
            xs = [each.to(HALF) for each in wide]
            results.append(torch.stack(wide))
        return results[1:]


@pytest.mark.parametrize(("last", "scaled"), [(64, True), (64, False), (128, True)])
def test_matches_float64_and_the_chain(tools: Any, last: int, scaled: bool) -> None:
    chain, control = Chain(tools, last, [2, 0], scaled), tools.control(2, 132)
    results = chain.run(control)
    for got, want, apart in zip(results, chain.reference(), chain.apart(control), strict=True):
        # What lies next to a rounding boundary may round the other way in the middle.
        torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=4e-3)
        assert torch.equal(got, apart)


def test_bits_do_not_depend_on_bundle(tools: Any) -> None:
    chain = Chain(tools, 64, [1, 2, 0])
    whole = chain.run(tools.control(3, 132), sms=3)
    for slot in range(3):
        alone = chain.run(tools.control(1, 1), slice(slot, slot + 1), sms=1)
        assert all(torch.equal(one[0], all_of[slot]) for one, all_of in zip(alone, whole, strict=True))
    for active, cap in [(3, 1), (2, 2), (0, 132)]:
        for got, all_of in zip(chain.run(tools.control(active, cap)), whole, strict=True):
            assert torch.equal(got[:active], all_of[:active])
            assert bool((got[active:] == 7.0).all())


def test_mistakes_are_named(tools: Any) -> None:
    chain = Chain(tools, 64, [0])
    named: dict[str, Any] = {"residual": chain.residual, "scales": chain.scales, "shifts": chain.shifts}
    tables = (chain.table, [1, 2, 3], chain.rows, tools.control(1, 1))
    with pytest.raises(ValueError, match="no chain that one launch is for"):
        block_launch(chain.x, *tables, *chain.results, **named)
    with pytest.raises(ValueError, match="same pixels"):
        block_launch(chain.x[:, :1].contiguous(), *tables, *chain.results, **named, tile=TILE)
    wrong = BlockTile(64, 32, 48, 4, 2, 2)
    with pytest.raises(ValueError, match="does not divide"):
        block_launch(chain.x, *tables, *chain.results, **named, tile=wrong)
    other = [*chain.shifts[:2], Vector(chain.arena.clone(), 0)]
    with pytest.raises(ValueError, match="one arena"):
        block_launch(chain.x, *tables, *chain.results, **named | {"shifts": other}, tile=TILE)

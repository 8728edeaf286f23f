"""On the device: a chain of convolutions in one launch has the bits of three, in every bundle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from torch_mux.lowering.kernels import choose_block, reference
from torch_mux.lowering.kernels.block import block
from torch_mux.lowering.kernels.conv import conv
from torch_mux.lowering.kernels.data import Vector

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
HALF, BRAIN = torch.float16, torch.bfloat16
OFFSETS = (0, 64, 320)


class Chain:
    """Operands of ``slots`` slots; values of magnitudes spread over 2 ** 12 where ``spread``."""

    def __init__(
        self, tools: Any, slots: int, last: int, dtype: torch.dtype, spread: bool, side: int
    ) -> None:
        def values(*shape: int) -> Tensor:
            found = torch.randn(shape, device=CUDA)
            if spread:
                found *= torch.exp2(torch.randint(-6, 7, shape, device=CUDA).float())
            return found

        smaller = 16 if spread else 1  # or sums would leave half precision's range
        self.last, self.dtype = last, dtype
        self.x = tools.guarded(values(slots, 1, side, side, 64).to(dtype))
        self.residual = tools.guarded(values(slots, 1, side, side, 256).to(dtype))
        kernels = [(64, 3, 3, 64), (256, 1, 1, 64), (last, 1, 1, 256)]
        self.weights = [
            [
                tools.guarded((values(*shape) / (shape[1] ** 2 * shape[3]) ** 0.5 / smaller).to(dtype))
                for _ in range(slots)
            ]
            for shape in kernels
        ]
        addresses = [[each.data_ptr() for each in row] for row in zip(*self.weights, strict=True)]
        self.table = torch.tensor(addresses, device=CUDA)
        self.arena = torch.randn(slots, 1024, device=CUDA)

    def vectors(self, scaled: bool) -> tuple[list[Vector] | None, list[Vector]]:
        scales = [Vector(self.arena, 512 + offset) for offset in OFFSETS] if scaled else None
        return scales, [Vector(self.arena, offset) for offset in OFFSETS]

    def results(self, slots: int) -> list[Tensor]:
        shapes = [(slots, *self.x.shape[1:-1], n) for n in (256, self.last)]
        return [torch.full(shape, 7.0, dtype=self.dtype, device=CUDA) for shape in shapes]

    def fused(self, rows: Tensor, control: Tensor, scaled: bool = True) -> list[Tensor]:
        """Of the slots ``rows``, each with its own weights."""
        scales, shifts = self.vectors(scaled)
        results = self.results(len(rows))
        x, residual = self.x[rows].contiguous(), self.residual[rows].contiguous()
        block(
            x, self.table, [0, 1, 2], rows, control, *results, residual=residual, scales=scales, shifts=shifts
        )
        return results

    def apart(self, rows: Tensor, control: Tensor, scaled: bool = True) -> list[Tensor]:
        """By three launches with the tiles that are chosen for them."""
        scales, shifts = self.vectors(scaled)
        x, addends, found = self.x[rows].contiguous(), (None, self.residual[rows].contiguous(), None), []
        for index, n in enumerate((64, 256, self.last)):
            out = torch.empty(*x.shape[:-1], n, dtype=self.dtype, device=CUDA)
            conv(
                x, self.table, index, rows, control, out, kernel=(1, 1) if index else (3, 3),
                padding=(0, 0) if index else (1, 1), scale=None if scales is None else scales[index],
                shift=shifts[index], residual=addends[index], activation="relu",
            )  # fmt: skip
            found.append(out)
            x = out
        return found[1:]


@pytest.fixture(autouse=True)
def its_device() -> None:
    if not choose_block.fused_on(CUDA):
        pytest.skip("chains are one launch on compute capability 9.0 only")


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("last", [64, 128])
@pytest.mark.parametrize("slots", [1, 16])
def test_the_bits_are_those_of_three_launches(
    gpu_tools: Any, slots: int, last: int, dtype: torch.dtype, scaled: bool, spread: bool
) -> None:
    chain = Chain(gpu_tools, slots, last, dtype, spread, 56 if slots > 1 else 61)
    rows, control = torch.arange(slots, device=CUDA), gpu_tools.control(slots, 132)
    fused, apart = chain.fused(rows, control, scaled), chain.apart(rows, control, scaled)
    assert all(map(torch.equal, fused, apart))
    assert bool(fused[1].any()) and bool(torch.isfinite(fused[1]).all())


@pytest.mark.parametrize("last", [64, 128])
def test_bits_do_not_depend_on_bundle(gpu_tools: Any, last: int) -> None:
    chain = Chain(gpu_tools, 16, last, HALF, False, 56)
    whole = chain.fused(torch.arange(16, device=CUDA), gpu_tools.control(16, 132))
    for slot in (0, 7, 15):
        alone = chain.fused(torch.tensor([slot], device=CUDA), gpu_tools.control(1, 132))
        assert all(torch.equal(one[0], each[slot]) for one, each in zip(alone, whole, strict=True))
    order = torch.randperm(16, device=CUDA)
    for active, cap in [(16, 1), (16, 50), (5, 132), (0, 132)]:
        for got, each in zip(chain.fused(order, gpu_tools.control(active, cap)), whole, strict=True):
            assert torch.equal(got[:active], each[order][:active])
            assert bool((got[active:] == 7.0).all())


def test_it_is_as_accurate_as_half_precision_allows(gpu_tools: Any) -> None:
    chain = Chain(gpu_tools, 2, 128, HALF, False, 40)
    rows = torch.arange(2, device=CUDA)
    results = chain.fused(rows, gpu_tools.control(2, 132))
    xs, scales = list(chain.x), chain.vectors(True)[0]
    assert scales is not None
    for index, weights in enumerate(chain.weights):
        n, at = weights[0].shape[0], OFFSETS[index]
        wide = reference.conv(
            xs, weights, padding=(0, 0) if index else (1, 1), activation="relu",
            scales=list(chain.arena[:, 512 + at : 512 + at + n]), shifts=list(chain.arena[:, at : at + n]),
            residuals=list(chain.residual) if index == 1 else None,
        )  # fmt: skip
        xs = [each.to(HALF) for each in wide]
        if index:  # what lies next to a rounding boundary may round the other way in the middle
            torch.testing.assert_close(results[index - 1].double(), torch.stack(wide), rtol=4e-3, atol=1e-2)

"""What a chain of convolutions compiles to for an H100, and what it is expected to cost."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from torch_mux.lowering.kernels import choose_block, common
from torch_mux.lowering.kernels.block import block_launch
from torch_mux.lowering.kernels.choose_block import BlockSize
from torch_mux.lowering.kernels.common import Launch
from torch_mux.lowering.kernels.data import Vector
from torch_mux.lowering.kernels.inspection import compile_launch
from torch_mux.lowering.pack.costs import KernelCosts, capped_grid

HALF, BRAIN = torch.float16, torch.bfloat16
SLOTS = 16


def block_of(last: int, dtype: torch.dtype, scaled: bool = True, slots: int = SLOTS, **named: Any) -> Launch:
    x, summed, out = (torch.empty(slots, 1, 56, 56, n, dtype=dtype) for n in (64, 256, last))
    arena = torch.zeros(SLOTS, 2048)
    vectors = [Vector(arena, offset) for offset in (0, 64, 320)]
    return block_launch(
        x, torch.zeros(SLOTS, 4, dtype=torch.int64), [0, 1, 2], torch.zeros(slots, dtype=torch.int64),
        torch.zeros(2, dtype=torch.int32), summed, out, residual=summed, shifts=vectors,
        scales=[replace(each, offset=each.offset + 1024) for each in vectors] if scaled else None,
        **{"sms": 132, **named},
    )  # fmt: skip


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("last", [64, 128])
def test_tensor_cores_fed_asynchronously(last: int, dtype: torch.dtype, scaled: bool) -> None:
    launch = block_of(last, dtype, scaled)
    found = compile_launch(launch)
    assert found.stack == 0 and found.mma == 0
    # 4 of a step of 64 elements of the 3 by 3, 4 of the sum's 64 channels, 2 of a step of 32 of its channels
    assert found.wgmma == 10
    wide = re.findall(r"cp\.async\.cg\.shared\.global[^\n]*?, 0x10", found.ptx)
    assert len(wide) >= 8 * (launch.tile.stages - 1) and "cp.async" in found.ptx
    assert found.programs_per_sm >= launch.tile.programs_per_sm


def test_it_waits_once_before_it_touches_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = block_of(64, HALF)
    monkeypatch.setattr(common, "dependent", lambda device: True)
    assert launch.options["launch_pdl"]
    before, *after = compile_launch(launch).ptx.split("griddepcontrol.wait")
    assert len(after) == 1
    touches = re.compile(r"(ld|st|red|atom)\.(\w+\.)*global|cp\.async|\bbra\b|\bret\b")
    assert touches.search(before) is None and touches.search(after[0]) is not None


@pytest.mark.parametrize("last", [64, 128])
def test_what_it_costs_follows_from_slots_and_cap(last: int) -> None:
    costs = KernelCosts(132)
    one, all_of = (block_of(last, HALF, slots=slots).operation for slots in (1, SLOTS))
    assert 5e-6 < costs.seconds([one], 132) < costs.seconds([all_of], 132) < 60e-6
    assert costs.seconds([all_of], 132) < costs.seconds([all_of], 32)
    assert str(all_of) == f"block 3x3 16x(3136x256x{last}) relu"
    assert not all_of.matches(all_of)


def test_a_cap_takes_no_program_more_than_its_waves_need() -> None:
    launch = block_of(64, HALF, slots=4)
    tiles, most = 4 * 49, 32 * launch.tile.programs_per_sm
    assert launch.grid == tiles
    grid = capped_grid(launch.operation, launch.tile, launch.grid, 32)
    assert (
        grid <= most
        and -(-tiles // grid) == -(-tiles // most)
        and -(-tiles // (grid - 1)) > -(-tiles // most)
    )


def test_which_sizes_are_its_own() -> None:
    size = BlockSize(3136, 64, 256, 64)
    assert choose_block.owned(size, HALF) and choose_block.owned(size._replace(last=128), BRAIN)
    assert not choose_block.owned(size, torch.float32)
    for other in ({"pixels": 784}, {"channels": 128}, {"wide": 512}, {"last": 256}):
        assert not choose_block.owned(size._replace(**other), HALF)
    assert not choose_block.fused_on(torch.device("cpu"))

"""The embedding super-kernel in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torch_mux.lowering.kernels import reference
from torch_mux.lowering.kernels.embedding import embedding

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
@pytest.mark.parametrize(("shape", "depth"), [((7,), 24), ((2, 5), 33), ((1, 3), 1030), ((), 8)])
def test_gathers_rows_exactly(
    tools: Any, filled: Any, shape: tuple[int, ...], depth: int, kind: torch.dtype, dtype: torch.dtype
) -> None:
    weights = [tools.guarded(torch.randn(11, depth).to(dtype)) for _ in range(3)]
    rows = torch.tensor([1, 2, 0])
    indices = torch.randint(0, 11, (3, *shape)).to(kind)
    out = filled(3, *shape, depth, dtype=dtype)
    embedding(indices, tools.table(weights), 1, rows, tools.control(2, 1), out, 11)
    want = reference.embedding(list(indices), [weights[row] for row in rows])
    assert torch.equal(out[:2], torch.stack(want)[:2])
    assert bool((out[2] == 7.0).all())


def test_an_index_outside_gives_nan_and_reads_nothing(tools: Any) -> None:
    weight = tools.guarded(torch.ones(4, 8))
    indices = torch.tensor([[0, 4, -1, 3, 1 << 40]])
    out = torch.zeros(1, 5, 8)
    embedding(
        indices, tools.table([weight]), 1, torch.zeros(1, dtype=torch.int64), tools.control(1, 1), out, 4
    )
    assert out.isnan().all(-1).tolist() == [[False, True, True, False, True]]
    assert bool((out[0, [0, 3]] == 1.0).all())


def test_refuses_what_it_cannot_read(tools: Any) -> None:
    table, rows, control = tools.table([torch.ones(4, 8)]), torch.arange(1), tools.control(1, 1)
    with pytest.raises(ValueError, match="int64 or int32"):
        embedding(torch.zeros(1, 2), table, 1, rows, control, torch.zeros(1, 2, 8), 4)
    with pytest.raises(ValueError, match="out must be contiguous"):
        embedding(torch.zeros(1, 2, dtype=torch.int64), table, 1, rows, control, torch.zeros(1, 3, 8), 4)

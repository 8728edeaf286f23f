"""The attention super-kernel in Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_mux.lowering.kernels import choose_attention, reference
from torch_mux.lowering.kernels.attention import attention
from torch_mux.lowering.kernels.choose_attention import Size
from torch_mux.lowering.kernels.data import Tile

pytestmark = pytest.mark.interpreter

HALF, FULL = torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """Sizes of every slot: images, heads, heads of keys, queries, keys, channels, channels of a value."""

    images: int
    heads: int
    shared: int
    m: int
    n: int
    d: int
    dv: int


def joint(tools: Any, case: Case, slots: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values where joined linear layers leave them, NaN on either side of the buffer."""
    m, n, heads, shared = case.m, case.n, case.heads, case.shared
    if m == n:
        widths = [heads * case.d, shared * case.d, shared * case.dv]
        whole = tools.guarded(torch.randn(slots, case.images, m, sum(widths)).to(dtype))
        parts = torch.split(whole, widths, -1)
    else:
        shapes = [(m, heads * case.d), (n, shared * case.d), (n, shared * case.dv)]
        parts = [tools.guarded(torch.randn(slots, case.images, *shape).to(dtype)) for shape in shapes]
    counts = (heads, shared, shared)
    return tuple(
        part.unflatten(-1, (count, -1)).transpose(2, 3) for part, count in zip(parts, counts, strict=True)
    )


def check(
    tools: Any, filled: Any, case: Case, dtype: torch.dtype, mask: Tensor | None = None, **named: Any
) -> None:
    """Two of three slots are active; the third's queries, keys and values are not read."""
    query, key, value = joint(tools, case, 3, dtype)
    key[2], value[2] = float("nan"), float("nan")
    out = filled(3, case.images, case.m, case.heads, case.dv, dtype=dtype)
    attention(query, key, value, tools.control(2, 1), out, mask=mask, **named)
    masks = None if mask is None else list(mask.expand(3, *mask.shape[1:]))
    named.pop("tile", None)
    want = torch.stack(reference.attention(list(query), list(key), list(value), masks, **named))
    epsilon = {FULL: 3e-6, HALF: 2e-3}[dtype]
    torch.testing.assert_close(out[:2].double(), want[:2], rtol=epsilon, atol=epsilon)
    assert bool((out[2] == 7.0).all())


@pytest.mark.parametrize("dtype", [HALF, FULL])
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 2, 2, 70, 70, 64, 64),
        Case(2, 2, 2, 64, 64, 32, 32),
        Case(1, 1, 1, 5, 130, 80, 80),
        Case(1, 2, 1, 33, 17, 96, 24),
        Case(1, 4, 2, 3, 3, 8, 8),
        Case(1, 1, 1, 1, 40, 128, 128),
        Case(1, 2, 2, 9, 9, 12, 12),
        Case(1, 1, 1, 4, 1, 1, 1),
    ],
    ids=str,
)
def test_matches_float64(tools: Any, filled: Any, case: Case, dtype: torch.dtype) -> None:
    check(tools, filled, case, dtype)
    for scale in (0.3, -0.3, 0.0):
        check(tools, filled, case, dtype, scale=scale)


CASE = Case(2, 2, 2, 40, 70, 16, 16)


@pytest.mark.parametrize("dtype", [HALF, FULL])
@pytest.mark.parametrize(
    "shape", [(3, 2, 2, 40, 70), (3, 2, 1, 1, 70), (1, 1, 2, 40, 70), (1, 1, 1, 1, 70)], ids=str
)
def test_masks_broadcast(tools: Any, filled: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    mask = torch.randn(shape)
    mask[..., :66][torch.rand(shape)[..., :66] < 0.4] = float("-inf")  # whole steps of some rows, too
    check(tools, filled, CASE, dtype, tools.guarded(mask.to(dtype)))
    check(tools, filled, CASE, dtype, tools.guarded(mask.expand(3, 2, 2, 40, 70).to(dtype))[:1, :1, :1, :1])


def test_a_row_that_may_see_nothing_is_zero(tools: Any, filled: Any) -> None:
    mask = torch.zeros(3, 2, 1, 40, 70)
    mask[:, :, :, 3] = float("-inf")
    mask[:, :, :, 4, :69] = float("-inf")
    mask[:, :, :, 5] = torch.finfo(HALF).min
    check(tools, filled, CASE, HALF, tools.guarded(mask.half()))


@pytest.mark.parametrize("dtype", [HALF, FULL])
@pytest.mark.parametrize(
    "case", [CASE, Case(1, 2, 2, 130, 130, 16, 16), Case(1, 1, 1, 90, 20, 16, 16)], ids=str
)
def test_causal(tools: Any, filled: Any, case: Case, dtype: torch.dtype) -> None:
    check(tools, filled, case, dtype, is_causal=True)


@pytest.mark.parametrize("dtype", [HALF, FULL])
def test_every_tile_and_bundle(tools: Any, filled: Any, dtype: torch.dtype) -> None:
    case = Case(1, 2, 2, 130, 70, 64, 64)
    query, key, value = joint(tools, case, 3, dtype)
    size = Size(case.m, case.n, case.d, case.dv)
    for tile in choose_attention.candidates(size, choose_attention.bit_class(size, dtype)):
        check(tools, filled, case, dtype, tile=tile)
        together = filled(3, 1, 130, 2, 64, dtype=dtype)
        attention(query, key, value, tools.control(3, 2), together, tile=tile)
        for slot in range(3):
            alone = filled(1, 1, 130, 2, 64, dtype=dtype)
            own = [each[slot : slot + 1] for each in (query, key, value)]
            attention(*own, tools.control(1, 1), alone, tile=tile)
            assert torch.equal(alone[0], together[slot])


def test_refuses_what_it_cannot_read(tools: Any, filled: Any) -> None:
    query, key, value = joint(tools, CASE, 1, HALF)
    out, control = filled(1, 2, 40, 2, 16, dtype=HALF), tools.control(1, 1)
    with pytest.raises(ValueError, match="throughout"):
        attention(query, key.float(), value, control, out)
    with pytest.raises(ValueError, match="do not fit"):
        attention(query, key[..., :8], value, control, out)
    with pytest.raises(ValueError, match="cannot share"):
        attention(query[:, :, :1], key, value, control, out)
    with pytest.raises(ValueError, match="out must be contiguous"):
        attention(query, key, value, control, out.transpose(2, 3))
    with pytest.raises(ValueError, match="must be dense"):
        attention(query.contiguous().mT.contiguous().mT, key, value, control, out)
    for mask in (torch.zeros(1, 1, 1, 1, 70, dtype=torch.bool), torch.zeros(1, 1, 1, 7, 70).half()):
        with pytest.raises(ValueError, match="broadcast"):
            attention(query, key, value, control, out, mask=mask)
    with pytest.raises(ValueError, match="outside"):
        attention(query, key, value, control, out, tile=Tile(64, 16, 64, 4, 2, 3))
    with pytest.raises(ValueError, match="outside"):
        attention(query, key, value, control, out, tile=Tile(32, 16, 32, 2, 2, 3))

"""Attention that stays the vendor's: what its kernel is given for a bundle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
LENGTH = 258  # longer than our kernel takes, and no multiple of what rows are aligned to
WIDTH = 16


def cudnn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
    return aten._scaled_dot_product_cudnn_attention(q, k, v, mask, False)[0]


def efficient(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
    """As PyTorch calls it: aligned, then expanded."""
    aligned = F.pad(mask, (0, -LENGTH % 16))[..., :LENGTH]
    whole = aligned.expand(*q.shape[:-1], LENGTH)
    return aten._scaled_dot_product_efficient_attention(q, k, v, whole, False)[0]


MASKS = [
    (1, 1, 1, LENGTH),
    (1, 1, LENGTH, LENGTH),
    (2, 1, 1, LENGTH),
    (2, 3, LENGTH, LENGTH),
    (1, 3, 1, LENGTH),
]


@pytest.mark.parametrize(
    ("call", "mask"),
    [
        *((call, mask) for call in (cudnn, efficient) for mask in MASKS),
        *((cudnn, mask) for mask in ((1, 1, LENGTH, 1), (LENGTH, LENGTH), (3, 1, LENGTH))),
    ],
)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_mask_has_a_number_for_each_head_query_and_key_and_aligned_rows(
    call: Callable[..., Any],
    mask: tuple[int, ...],
    batch: int,
    dtype: torch.dtype,
    batched: Callable[..., Any],
) -> None:
    """The one kernel that both become takes no mask that is to be broadcast, nor rows that begin anywhere."""
    mask = (min(batch, mask[0]), *mask[1:]) if len(mask) == 4 else mask
    heads = [torch.randn(batch, 3, LENGTH, WIDTH).half() for _ in range(3)]
    given = torch.randn(mask).to(dtype if call is cudnn else torch.float16)
    lowered = batched(call, [*heads, given])
    assert lowered.reasons == []
    (node,) = lowered.graph.graph.find_nodes(
        op="call_function", target=aten._scaled_dot_product_efficient_attention.default
    )
    bound = (
        dict(zip((one.name for one in node.target._schema.arguments), node.args, strict=False)) | node.kwargs
    )
    query, bias = bound["query"].meta["val"], bound["attn_bias"].meta["val"]
    assert list(map(int, bias.shape[1:])) == [3, LENGTH, LENGTH]
    assert str(bias.shape[0]) == str(query.shape[0]), "of every slot"
    assert bias.dtype is query.dtype
    assert bias.stride(-1) == 1 and [int(stride) % 8 for stride in bias.stride()[:-1]] == [0, 0, 0]

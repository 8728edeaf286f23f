"""Attention that stays the vendor's: what its kernel is given for a bundle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

aten = torch.ops.aten
LENGTH = 258  # longer than our kernel takes


def cudnn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
    return aten._scaled_dot_product_cudnn_attention(q, k, v, mask, False)[0]


def efficient(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
    return aten._scaled_dot_product_efficient_attention(q, k, v, mask.expand(2, 3, LENGTH, LENGTH), False)[0]


@pytest.mark.parametrize("call", [cudnn, efficient])
@pytest.mark.parametrize(
    "mask", [(1, 1, 1, LENGTH), (2, 1, 1, LENGTH), (2, 1, LENGTH, LENGTH), (1, 3, 1, LENGTH)]
)
def test_a_mask_has_a_number_for_each_head_query_and_key(
    call: Callable[..., Any], mask: tuple[int, ...], batched: Callable[..., Any]
) -> None:
    """The one kernel that both become takes no mask that is to be broadcast."""
    heads = [torch.randn(2, 3, LENGTH, 16).half() for _ in range(3)]
    lowered = batched(call, [*heads, torch.randn(mask).half()])
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
    assert bias.stride(-1) == 1, "which the kernel asks for"

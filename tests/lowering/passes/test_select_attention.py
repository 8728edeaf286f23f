"""Whichever vendor kernel PyTorch picked for attention, ours takes the shapes that it is made for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from torch_mux.lowering.graphs import call_nodes, fake_of

aten = torch.ops.aten

VENDOR: dict[str, Callable[..., Any]] = {
    "flash": lambda q, k, v, m: aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=0.5)[0],
    "efficient": lambda q, k, v, m: aten._scaled_dot_product_efficient_attention(q, k, v, m, False)[0],
    "cudnn": lambda q, k, v, m: aten._scaled_dot_product_cudnn_attention(q, k, v, m, False)[0],
    "cpu": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
}


def arguments(length: int, width: int, dtype: torch.dtype = torch.float16) -> list[Tensor]:
    heads = [torch.randn(2, 3, length, width).to(dtype) for _ in range(3)]
    return [*heads, torch.randn(2, 1, 1, length).to(dtype)]


def called(module: GraphModule) -> dict[str, tuple[Any, ...]]:
    """Arguments by the names of operations."""
    nodes = [node for node in call_nodes(module.graph) if isinstance(node.target, torch._ops.OpOverload)]
    return {node.target.overloadpacket.__name__: node.args for node in nodes}  # type: ignore[union-attr]


@pytest.mark.parametrize("name", list(VENDOR))
def test_short_attention_is_ours(
    name: str, program_of: Callable[..., Any], lowered: Callable[[Any], GraphModule]
) -> None:
    def layer(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Any:
        return VENDOR[name](q, k, v, m.expand(2, 3, 20, 20)) + 1.0

    module = lowered(program_of(layer, arguments(20, 16), []))
    *heads, mask, is_causal, scale = called(module)["attention"]
    assert set(called(module)) == {"attention", "add"}
    assert [fake_of(each).shape for each in heads] == [(2, 3, 20, 16)] * 3
    if name == "flash":
        assert (mask, is_causal, scale) == (None, True, 0.5)
    else:  # as it was before it was expanded
        assert (fake_of(mask).shape, is_causal, scale) == ((2, 1, 1, 20), False, None)


@pytest.mark.parametrize(
    ("length", "width", "dtype", "masked"),
    [
        (258, 16, torch.float16, True),
        (258, 16, torch.float32, False),
        (20, 136, torch.float16, False),
        (20, 72, torch.float32, False),
    ],
)
def test_the_rest_stays_the_vendors(
    length: int,
    width: int,
    dtype: torch.dtype,
    masked: bool,
    program_of: Callable[..., Any],
    lowered: Callable[[Any], GraphModule],
) -> None:
    for name in ("efficient", "cudnn"):

        def layer(q: Tensor, k: Tensor, v: Tensor, m: Tensor, call: Any = VENDOR[name]) -> Any:
            return call(q, k, v, m.expand(2, 3, length, length) if masked else None)

        module = lowered(program_of(layer, arguments(length, width, dtype), []))
        assert "attention" not in called(module)


@pytest.mark.parametrize("name", ["dropout", "normaliser"])
def test_what_draws_or_returns_more_stays_the_vendors(
    name: str, program_of: Callable[..., Any], lowered: Callable[[Any], GraphModule]
) -> None:
    def layer(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Any:
        if name == "dropout":
            return aten._scaled_dot_product_flash_attention(q, k, v, 0.5)[0]
        return aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]

    assert "attention" not in called(lowered(program_of(layer, arguments(20, 16), [])))

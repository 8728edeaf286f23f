"""All of ATen that is tagged pointwise: every operand is aligned behind the slot axis."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .base import Context, NoRule, Parameter, Slotted, rule, shape_of_slot

__all__: list[str] = []

aten = torch.ops.aten


#: Element-wise without the tag.
_UNTAGGED = (
    aten._to_copy.default,
    aten.hardswish.default,
    aten.fmod.Scalar,
    aten.fmod.Tensor,
    aten.floor_divide.default,
    aten.floor_divide.Scalar,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
)


@rule(torch.Tag.pointwise, *_UNTAGGED)
def _pointwise(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    target: Any = node.target
    if target._schema.is_mutable:
        raise NoRule(f"{target} writes its input")
    rank = len(shape_of_slot(node))
    aligned = [context.aligned(arg, rank) for arg in args]
    named = {
        key: value
        for key, value in kwargs.items()
        if key not in ("memory_format", "device", "layout", "pin_memory")
    }
    named = {key: context.aligned(value, rank) for key, value in named.items()}
    return Slotted(target(*aligned, **named))


@rule(
    aten.full_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.empty_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
)
def _like(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    value = node.meta["val"]
    target: Any = node.target
    fill: Any = {"zeros": 0, "ones": 1, "empty": 0}.get(
        target._opname.replace("new_", "").replace("_like", "")
    )
    if fill is None:
        fill = args[-1] if "fill_value" not in kwargs else kwargs["fill_value"]
    if isinstance(fill, (Tensor, Slotted, Parameter)):
        raise NoRule(f"{target} with a tensor fill value")
    return torch.full(tuple(value.shape), fill, dtype=value.dtype, device=value.device)

"""All of ATen that is tagged pointwise: every operand is aligned behind the slot axis."""

from __future__ import annotations

import functools
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
    ranked = _ranked_dtype(node)

    def aligned(value: Any) -> Any:
        if not isinstance(value, (Slotted, Parameter)):
            return value
        tensor = context.lift(value)
        if ranked is not None and tensor.dim() == 1 and _category(tensor.dtype) == _category(ranked):
            tensor = tensor.to(ranked)
        return context.aligned(Slotted(tensor), rank)

    named = {
        key: aligned(value)
        for key, value in kwargs.items()
        if key not in ("memory_format", "device", "layout", "pin_memory")
    }
    return Slotted(target(*map(aligned, args), **named))


def _category(dtype: torch.dtype) -> tuple[bool, bool, bool]:
    return dtype == torch.bool, dtype.is_floating_point, dtype.is_complex


def _ranked_dtype(node: Node) -> torch.dtype | None:
    """The dtype that a slot's operands with dimensions have together; None where all or none have some.

    Operands of no dimension take it if they are of its kind, and the slot axis must not change that: a
    float32 tensor is compared with a float64 scalar in float32.
    """
    operands = [source.meta["val"] for source in node.all_input_nodes]
    tensors = [value for value in operands if isinstance(value, Tensor)]
    dtypes = [tensor.dtype for tensor in tensors if tensor.dim() > 0]
    if not dtypes or len(dtypes) == len(tensors):
        return None
    return functools.reduce(torch.promote_types, dtypes)


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

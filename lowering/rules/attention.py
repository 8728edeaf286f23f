"""Scaled dot-product attention: slots fold into the batch of the vendor kernel that one slot would use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .base import Context, NoRule, Parameter, Slotted, rule

__all__: list[str] = []

aten = torch.ops.aten

_OPERATIONS = [
    getattr(aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    )
]


@rule(*_OPERATIONS)
def _attention(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    target: Any = node.target
    names = [argument.name for argument in target._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    if given.get("dropout_p", 0.0) != 0.0:
        raise NoRule(f"{target} with dropout")
    query = context.lift(given["query"])
    batch = query.shape[1]
    for name, value in given.items():
        if not isinstance(value, (Slotted, Parameter, Tensor)):
            continue
        tensor = context.lift(value)
        if tensor.dim() < query.dim():
            tensor = context.aligned(Slotted(tensor), query.dim() - 1)
        given[name] = context.fold(Slotted(tensor), int(batch))
    result = target(**given)
    return (context.unfold(result[0]), *([None] * (len(result) - 1)))

"""Scaled dot-product attention in the vendor kernel that one slot would use.

On CUDA slots fold into its batch. On the CPU, where that would change bits, it is called once a slot.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..ops.slots import SLOT_ATTENTION
from .base import Context, NoRule, Parameter, Slotted, rule

__all__: list[str] = []

aten = torch.ops.aten

_ON_CPU = aten._scaled_dot_product_flash_attention_for_cpu.default
_FOLDING = [
    getattr(aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    )
]


@rule(_ON_CPU, *_FOLDING)
def _attention(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    target: Any = node.target
    names = [argument.name for argument in target._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    if given.get("dropout_p", 0.0) != 0.0:
        raise NoRule(f"{target} with dropout")
    query = context.lift(given["query"])
    batch = int(query.shape[1])
    for name, value in given.items():
        if not isinstance(value, (Slotted, Parameter, Tensor)):
            continue
        tensor = context.lift(value)
        if tensor.dim() < query.dim():
            tensor = context.aligned(Slotted(tensor), query.dim() - 1)
        given[name] = tensor if tensor.shape[1] == batch else tensor.expand(-1, batch, *tensor.shape[2:])
    if target is _ON_CPU:
        taken = ("query", "key", "value", "attn_mask", "is_causal", "scale")
        defaults = {"attn_mask": None, "is_causal": False, "scale": None}
        out = SLOT_ATTENTION(*[(defaults | given)[name] for name in taken])
        return (Slotted(out), None)
    folded = {n: context.fold(Slotted(v)) if isinstance(v, Tensor) else v for n, v in given.items()}
    result = target(**folded)
    return (context.unfold(result[0]), *([None] * (len(result) - 1)))

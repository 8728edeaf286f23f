"""Scaled dot-product attention over all slots: in one super-kernel, or in the vendor kernel of one slot.

Which of the two the shape of the operation decided in ``passes/select_attention.py``. In a vendor kernel
slots fold into the batch; it has to be one whose bits do not depend on that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..ops.attention import ATTENTION, SLOT_ATTENTION
from .base import Context, NoRule, Parameter, Slotted, rule

__all__: list[str] = []

aten = torch.ops.aten

#: Elements that begin a row of a mask, as PyTorch aligns them itself before it calls the vendor kernel.
_LINE = 16
_EFFICIENT = aten._scaled_dot_product_efficient_attention.default
_OVERRIDEABLE = aten._scaled_dot_product_fused_attention_overrideable.default
#: They choose how to split keys by batch and heads.
_SPLITTING = (
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
)


def _dense(tensor: Tensor) -> Tensor:
    """``tensor`` with its last dimension dense, as the kernel reads it."""
    return tensor if tensor.shape[-1] == 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _mask(context: Context, value: Any, keys: int) -> Tensor:
    """[T, B, H, M, N] with 1 along every dimension but the last where it is the same for all."""
    mask = context.aligned(Slotted(context.lift(value)), 4)
    for dim, stride in enumerate(mask.stride()[:-1]):
        if isinstance(stride, int) and stride == 0:
            mask = mask.narrow(dim, 0, 1)
    return _dense(mask.expand(*mask.shape[:-1], keys))


@rule(ATTENTION)
def _own(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    *operands, mask, is_causal, scale = args
    query, key, value = (_dense(context.lift(operand)) for operand in operands)
    added = None if mask is None else _mask(context, mask, int(key.shape[-2]))
    out = SLOT_ATTENTION(query, key, value, added, context.control, is_causal, scale, context.allow_tf32[0])
    return Slotted(out)


@rule(_EFFICIENT, _OVERRIDEABLE, *_SPLITTING)
def _vendor(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
    folded = {n: context.fold(Slotted(v)) if isinstance(v, Tensor) else v for n, v in given.items()}
    if target in _SPLITTING:
        target, folded = _EFFICIENT, _without_splits(folded)
    if target is _EFFICIENT and folded.get("attn_bias") is not None:
        whole = (*folded["query"].shape[:-1], folded["key"].shape[-2])
        folded["attn_bias"] = _lined_up(folded["attn_bias"].to(folded["query"].dtype), whole)
    result = target(**folded)
    return (context.unfold(result[0]), *([None] * (len(result) - 1)))


def _lined_up(bias: Tensor, whole: Sequence[Any]) -> Tensor:
    """``bias`` of shape ``whole``: the kernel broadcasts nothing itself, and its rows have to be aligned."""
    keys = whole[-1]
    bias = _dense(bias.expand(*bias.shape[:-1], keys))
    if any(stride % _LINE for stride in bias.stride()[:-1]):
        bias = aten.constant_pad_nd.default(bias, [0, -keys % _LINE])[..., :keys]
    return bias.expand(whole)


def _without_splits(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the vendor kernel that takes all keys of a query in one order.

    Raises:
        NoRule: it has no kernel for heads that share keys.
    """
    if given["query"].shape[1] != given["key"].shape[1]:
        raise NoRule("vendor attention whose heads share keys splits them by the batch")
    names = ("query", "key", "value", "is_causal", "scale")
    taken = {name: given[name] for name in names if name in given}
    return taken | {"attn_bias": given.get("attn_bias"), "compute_log_sumexp": False}

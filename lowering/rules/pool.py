"""Operations whose first dimension is a batch of independent items: the slot axis folds into it."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from .base import Context, NoRule, Parameter, Slotted, rule

__all__: list[str] = []

aten = torch.ops.aten


@rule(
    aten.max_pool2d_with_indices.default,
    aten.avg_pool2d.default,
    aten._adaptive_avg_pool2d.default,
    aten.adaptive_max_pool2d.default,
    aten.upsample_nearest2d.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.default,
    aten.upsample_bilinear2d.vec,
    aten.upsample_bicubic2d.default,
    aten.upsample_bicubic2d.vec,
    aten.reflection_pad2d.default,
    aten.replication_pad2d.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
)
def _images(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if context.lift(args[0]).dim() != 5:
        raise NoRule(f"{node.target} without a batch dimension")
    if any(isinstance(arg, (Slotted, Parameter)) for arg in (*args[1:], *kwargs.values())):
        raise NoRule(f"{node.target} with several tensors")
    target: Any = node.target
    result = target(context.fold(args[0]), *args[1:], **kwargs)
    if isinstance(result, tuple):
        return tuple(context.unfold(item) for item in result)
    return context.unfold(result)


@rule(aten.bmm.default)
def _bmm(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return context.unfold(torch.bmm(context.fold(args[0]), context.fold(args[1])))


@rule(aten.mm.default)
def _mm(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return Slotted(torch.bmm(context.lift(args[0]), context.lift(args[1])))


@rule(aten.baddbmm.default)
def _baddbmm(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    product = torch.bmm(context.fold(args[1]), context.fold(args[2]))
    alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
    bias = context.aligned(args[0], 3)
    return Slotted(context.unfold(product).tensor * alpha + bias * beta)


@rule(aten.addmm.default)
def _addmm(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    product = torch.bmm(context.lift(args[1]), context.lift(args[2]))
    alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
    return Slotted(product * alpha + context.aligned(args[0], 2) * beta)

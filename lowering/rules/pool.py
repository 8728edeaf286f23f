"""Operations whose first dimension is a batch of independent items: the slot axis folds into it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..ops.products import SLOT_BMM
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


def _product(context: Context, left: Tensor, right: Tensor) -> Tensor:
    """[T, B, M, K] times [T, B, K, N]: slots fold into the batch on CUDA, each is a call on the CPU."""
    if context.rows.device.type == "cpu":
        product: Tensor = SLOT_BMM(left, right)
        return product
    return context.unfold(torch.bmm(context.fold(Slotted(left)), context.fold(Slotted(right)))).tensor


def _matrices(context: Context, left: Any, right: Any) -> Tensor:
    """[T, M, K] times [T, K, N]."""
    return _product(context, context.lift(left).unsqueeze(1), context.lift(right).unsqueeze(1)).squeeze(1)


@rule(aten.bmm.default)
def _bmm(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return Slotted(_product(context, context.lift(args[0]), context.lift(args[1])))


@rule(aten.mm.default)
def _mm(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return Slotted(_matrices(context, args[0], args[1]))


@rule(aten.baddbmm.default)
def _baddbmm(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    product = _product(context, context.lift(args[1]), context.lift(args[2]))
    return _sum(context, product, args[0], 3, kwargs)


@rule(aten.addmm.default)
def _addmm(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _sum(context, _matrices(context, args[1], args[2]), args[0], 2, kwargs)


def _sum(context: Context, product: Tensor, bias: Any, rank: int, kwargs: dict[str, Any]) -> Slotted:
    """``alpha * product + beta * bias``; a ``beta`` of 0 ignores the bias, NaN and all."""
    alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
    scaled = product * alpha
    return Slotted(scaled if beta == 0 else scaled + context.aligned(bias, rank) * beta)

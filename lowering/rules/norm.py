"""Normalisation layers, computed in float32 and rounded once, with their affine part read from the arena."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .base import Context, NoRule, Slotted, rule

__all__: list[str] = []

aten = torch.ops.aten


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _affine(context: Context, x: Tensor, weight: Any, bias: Any, rank: int) -> Tensor:
    """``x * weight + bias``, both aligned to the last dimensions of a slot of ``rank`` dimensions."""
    if weight is not None:
        x = x * _wide(context.aligned(Slotted(context.lift(weight)), rank))
    if bias is not None:
        x = x + _wide(context.aligned(Slotted(context.lift(bias)), rank))
    return x


@rule(aten.native_layer_norm.default)
def _layer_norm(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    value, normalized, weight, bias, epsilon = args
    x = context.lift(value)
    dims = list(range(x.dim() - len(normalized), x.dim()))
    wide = _wide(x)
    variance, mean = torch.var_mean(wide, dims, correction=0, keepdim=True)
    scaled = (wide - mean) * torch.rsqrt(variance + epsilon)
    return Slotted(_affine(context, scaled, weight, bias, x.dim() - 1).to(x.dtype)), None, None


@rule(aten.native_group_norm.default)
def _group_norm(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    value, weight, bias, _, channels, _, groups, epsilon = args
    x = context.lift(value)
    grouped = _wide(x).reshape(x.shape[0], x.shape[1], groups, -1)
    variance, mean = torch.var_mean(grouped, [3], correction=0, keepdim=True)
    scaled = ((grouped - mean) * torch.rsqrt(variance + epsilon)).reshape(x.shape)

    def vector(parameter: Any) -> Any:
        if parameter is None:
            return None
        return Slotted(context.lift(parameter).view(context.slots, 1, channels, *([1] * (x.dim() - 3))))

    return (
        Slotted(_affine(context, scaled, vector(weight), vector(bias), x.dim() - 1).to(x.dtype)),
        None,
        None,
    )


@rule(aten._native_batch_norm_legit_no_training.default)
def _batch_norm(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    raise NoRule("batch normalisation with statistics that are neither parameters nor buffers")


@rule(aten.rms_norm.default, getattr(aten, "_fused_rms_norm", aten.rms_norm).default)
def _rms_norm(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    value, normalized, weight = args[0], args[1], args[2] if len(args) > 2 else None
    epsilon = args[3] if len(args) > 3 else None
    x = context.lift(value)
    wide = _wide(x)
    dims = list(range(x.dim() - len(normalized), x.dim()))
    epsilon = torch.finfo(x.dtype).eps if epsilon is None else epsilon
    scaled = wide * torch.rsqrt(wide.square().mean(dims, keepdim=True) + epsilon)
    result = Slotted(_affine(context, scaled, weight, None, x.dim() - 1).to(x.dtype))
    return result if isinstance(node.meta["val"], Tensor) else (result, None)

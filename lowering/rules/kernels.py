"""``mux::linear``, ``linears``, ``convolution`` and ``block`` become one super-kernel call over all slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..ops.block import BLOCK, SLOT_BLOCK
from ..ops.semantic import CONVOLUTION, LINEAR, LINEARS, Convolution
from ..ops.slots import SLOT_CONVOLUTION, SLOT_LINEAR
from .base import Context, NoRule, Parameter, Slotted, rule

__all__: list[str] = []

_TO_LAST, _TO_FIRST = (0, 1, 3, 4, 2), (0, 1, 4, 2, 3)


def _weight(value: Any) -> Parameter:
    if not isinstance(value, Parameter):
        raise NoRule("a kernel whose weight is no parameter")
    return value


def _vector(context: Context, value: Any) -> tuple[Tensor | None, int]:
    """(arena, offset) of a per-channel vector."""
    if value is None:
        return None, 0
    if not isinstance(value, Parameter):
        raise NoRule("an epilogue vector that is no parameter")
    place = context.fields[value.index]
    return context.arenas[place.dtype], place.offset


def _epilogue(context: Context, scale: Any, shift: Any) -> tuple[Any, ...]:
    return (*_vector(context, scale), *_vector(context, shift))


def _products(
    context: Context, x: Any, weights: Sequence[Any], scale: Any, shifts: Sequence[Any], *rest: Any
) -> Tensor:
    """[T, ..., sum of widths]: ``x`` by each of the weights, one call."""
    residual, activation = rest
    x, known = context.lift(x), [_weight(weight) for weight in weights]
    flat = x.reshape(context.slots, -1, x.shape[-1]).contiguous()
    widths = [weight.shape[0] for weight in known]
    added = None
    if residual is not None:
        added = context.lift(residual).reshape(context.slots, -1, sum(widths)).contiguous()
    scale, scale_offset = _vector(context, scale)
    vectors = [_vector(context, shift) for shift in shifts]
    out: Tensor = SLOT_LINEAR(
        flat,
        context.table,
        context.rows,
        context.control,
        [context.columns[weight.index] for weight in known],
        widths,
        [stride for weight in known for stride in weight.strides],
        scale,
        [scale_offset] * len(known),
        vectors[0][0],
        [offset for _, offset in vectors],
        added,
        activation,
        context.allow_tf32[0],
        context.key,
    )
    return out.view(context.slots, *x.shape[1:-1], sum(widths))


def _channels_last(context: Context, image: Any) -> Tensor:
    """[T, B, H, W, C] of ``image``, dense."""
    return context.lift(image).permute(_TO_LAST).contiguous()


@rule(LINEAR)
def _linear(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, weight, scale, shift, residual, activation = args
    return Slotted(_products(context, x, [weight], scale, [shift], residual, activation))


@rule(LINEARS)
def _linears(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, weights, shifts, activation = args
    out = _products(context, x, weights, None, shifts or [None] * len(weights), None, activation)
    return tuple(map(Slotted, torch.split(out, [weight.shape[0] for weight in weights], -1)))


@rule(CONVOLUTION)
def _convolution(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = Convolution(*args)
    if call.transposed or len(call.stride) != 2:
        raise NoRule("a convolution that is not plain and two-dimensional")
    weight, residual = _weight(call.weight), call.residual
    x = _channels_last(context, call.x)
    added = None if residual is None else _channels_last(context, residual)
    out = SLOT_CONVOLUTION(
        x,
        context.table,
        context.rows,
        context.control,
        context.columns[weight.index],
        weight.shape[0],
        list(weight.shape[2:]),
        call.stride,
        call.padding,
        call.dilation,
        call.groups,
        *_epilogue(context, call.scale, call.shift),
        added,
        call.activation,
        context.allow_tf32[1],
        context.key,
    )
    return Slotted(out.permute(_TO_FIRST))


@rule(BLOCK)
def _block(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, weights, scales, shifts, residual = args
    known = [_weight(weight) for weight in weights]
    factors = [_vector(context, scale) for scale in scales or [None] * len(known)]
    terms = [_vector(context, shift) for shift in shifts]
    results = SLOT_BLOCK(
        _channels_last(context, x),
        context.table,
        context.rows,
        context.control,
        [context.columns[weight.index] for weight in known],
        [weight.shape[0] for weight in known],
        factors[0][0],
        [offset for _, offset in factors],
        terms[0][0],
        [offset for _, offset in terms],
        _channels_last(context, residual),
        context.key,
    )
    return tuple(Slotted(result.permute(_TO_FIRST)) for result in results)

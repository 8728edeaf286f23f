"""Reads by index: embeddings through the pointer table, constant indices along a dimension, ``gather``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..ops.slots import SLOT_EMBEDDING
from .base import Context, NoRule, Parameter, Slotted, rule

__all__: list[str] = []

aten = torch.ops.aten


@rule(aten.embedding.default)
def _embedding(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    weight, indices = args[0], args[1]
    if not isinstance(weight, Parameter):
        raise NoRule("an embedding whose weight is no parameter")
    column = context.columns[weight.index]
    return Slotted(
        SLOT_EMBEDDING(
            context.lift(indices).contiguous(),
            context.table,
            context.rows,
            context.control,
            column,
            weight.shape[0],
            weight.shape[1],
            weight.dtype,
            context.key,
        )
    )


@rule(aten.index.Tensor, aten._unsafe_index.Tensor)
def _index(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    target: Any = node.target
    indices = [index for index in args[1] if index is not None]
    gaps = [position for position, index in enumerate(args[1]) if index is not None]
    masks = any(_dtype(index) == torch.bool for index in indices)
    if masks or gaps != list(range(gaps[0], gaps[-1] + 1)):
        raise NoRule("index by a mask or by separated dimensions")
    x = context.lift(args[0])
    if all(isinstance(index, Tensor) for index in indices):
        return Slotted(target(x, [None, *args[1]]))
    if gaps[0] > 0:
        raise NoRule("index by a value that differs a slot, behind a dimension")
    lifted = [context.lift(index) for index in indices]
    rank = max(index.dim() for index in lifted)
    slot = torch.arange(x.shape[0], device=x.device).view(-1, *[1] * (rank - 1))
    aligned = [
        index.reshape(index.shape[0], *[1] * (rank - index.dim()), *index.shape[1:]) for index in lifted
    ]
    return Slotted(target(x, [slot, *aligned]))


def _dtype(index: Tensor | Slotted | Parameter) -> torch.dtype:
    return index.tensor.dtype if isinstance(index, Slotted) else index.dtype


@rule(aten.index_select.default)
def _index_select(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = context.lift(args[0])
    if not isinstance(args[2], Tensor):
        raise NoRule("index_select by a value that differs a slot")
    return Slotted(x.index_select(args[1] % (x.dim() - 1) + 1, args[2]))


@rule(aten.gather.default)
def _gather(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, index = context.lift(args[0]), context.lift(args[2])
    return Slotted(x.gather(args[1] % (x.dim() - 1) + 1, index))

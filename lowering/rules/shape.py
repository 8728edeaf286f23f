"""Views, copies, concatenation and padding: the dimension numbers move one up, shapes gain T in front."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .base import Context, NoRule, Parameter, Slotted, rule, shape_of_slot

__all__: list[str] = []

aten = torch.ops.aten


def _up(dim: int, rank: int) -> int:
    """A slot's dimension number as one behind the slot axis."""
    return (dim % rank if rank else 0) + 1


def _rank(tensor: Tensor) -> int:
    return tensor.dim() - 1


@rule(
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten._reshape_alias.default,
)
def _reshape(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return Slotted(context.lift(args[0]).reshape(context.slots, *shape_of_slot(node)))


@rule(
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
)
def _identity(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return Slotted(context.lift(args[0]))


@rule(aten.expand.default)
def _expand(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    shape = shape_of_slot(node)
    return Slotted(context.aligned(Slotted(context.lift(args[0])), len(shape)).expand(context.slots, *shape))


@rule(aten.permute.default)
def _permute(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = context.lift(args[0])
    return Slotted(x.permute(0, *(_up(dim, _rank(x)) for dim in args[1])))


@rule(aten.transpose.int)
def _transpose(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = context.lift(args[0])
    return Slotted(x.transpose(_up(args[1], _rank(x)), _up(args[2], _rank(x))))


@rule(aten.t.default)
def _t(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = context.lift(args[0])
    return Slotted(x.transpose(1, 2)) if _rank(x) == 2 else Slotted(x)


@rule(
    aten.select.int,
    aten.slice.Tensor,
    aten.narrow.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
)
def _along(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = context.lift(args[0])
    target: Any = node.target
    names = [argument.name for argument in target._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    given[names[0]] = x
    given["dim"] = _up(given.get("dim", 0), _rank(x))
    result = target(**given)
    return tuple(Slotted(item) for item in result) if isinstance(result, (tuple, list)) else Slotted(result)


@rule(aten.flip.default)
def _flip(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = context.lift(args[0])
    return Slotted(x.flip([_up(dim, _rank(x)) for dim in args[1]]))


@rule(aten.roll.default)
def _roll(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = context.lift(args[0])
    if len(args) < 3 or not args[2]:
        raise NoRule("roll over flattened dimensions")
    return Slotted(x.roll(args[1], [_up(dim, _rank(x)) for dim in args[2]]))


@rule(aten.repeat.default)
def _repeat(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = context.aligned(Slotted(context.lift(args[0])), len(args[1]))
    return Slotted(x.repeat(1, *args[1]))


@rule(aten.constant_pad_nd.default, aten.tril.default, aten.triu.default)
def _on_last_dimensions(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    target: Any = node.target
    return Slotted(target(context.lift(args[0]), *args[1:], **kwargs))


def _together(context: Context, values: Any) -> list[Tensor]:
    return [context.lift(value) for value in values]


@rule(aten.cat.default)
def _cat(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    rank = len(shape_of_slot(node))
    tensors = [tensor for tensor in _together(context, args[0]) if _rank(tensor) == rank]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    return Slotted(torch.cat(tensors, _up(dim, rank)))


@rule(aten.stack.default)
def _stack(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    return Slotted(torch.stack(_together(context, args[0]), _up(dim, len(shape_of_slot(node)))))


@rule(torch.ops.prims.convert_element_type.default)
def _convert(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not isinstance(args[0], (Slotted, Parameter)):
        raise NoRule("convert_element_type of a constant")
    return Slotted(context.lift(args[0]).to(args[1]))

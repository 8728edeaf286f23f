"""Reductions, scans and softmax: dimensions named by ``dim`` move behind the slot axis."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from .base import Context, NoRule, Slotted, rule

__all__: list[str] = []

aten = torch.ops.aten


def _results(value: Any) -> Any:
    return tuple(Slotted(item) for item in value) if isinstance(value, (tuple, list)) else Slotted(value)


@rule(
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.amax.default,
    aten.amin.default,
    aten.max.dim,
    aten.min.dim,
    aten.argmax.default,
    aten.argmin.default,
    aten.any.dim,
    aten.any.dims,
    aten.all.dim,
    aten.all.dims,
    aten.prod.dim_int,
    aten.var.correction,
    aten.std.correction,
    aten.var_mean.correction,
    aten.logsumexp.default,
    aten.linalg_vector_norm.default,
    aten.cumsum.default,
    aten.cumprod.default,
    aten._softmax.default,
    aten._log_softmax.default,
    aten._safe_softmax.default,
    aten.softmax.int,
    aten.log_softmax.int,
    aten.sort.default,
    aten.topk.default,
)
def _along_dims(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    target: Any = node.target
    names = [argument.name for argument in target._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    x = context.lift(args[0])
    rank = x.dim() - 1
    if rank == 0:
        raise NoRule(f"{target} over a scalar")
    defaults = {argument.name: argument.default_value for argument in target._schema.arguments}
    dim = given.get("dim", defaults.get("dim"))
    if dim is None or dim == []:
        if target in (aten.argmax.default, aten.argmin.default) and not given.get("keepdim", False):
            x, dim = x.reshape(x.shape[0], -1), 0
            rank = 1
        elif target in (aten.argmax.default, aten.argmin.default):
            raise NoRule(f"{target} over every dimension with keepdim")
        else:
            dim = list(range(rank))
    given[names[0]] = x
    given["dim"] = [d % rank + 1 for d in dim] if isinstance(dim, (list, tuple)) else dim % rank + 1
    return _results(target(**given))


@rule(
    aten.mean.default,
    aten.sum.default,
    aten.max.default,
    aten.min.default,
    aten.any.default,
    aten.all.default,
)
def _over_all(context: Context, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = context.lift(args[0])
    flat = x.reshape(x.shape[0], -1)
    reductions: dict[Any, Any] = {
        aten.mean.default: aten.mean.dim,
        aten.sum.default: aten.sum.dim_IntList,
        aten.max.default: aten.amax.default,
        aten.min.default: aten.amin.default,
    }
    if node.target in (aten.any.default, aten.all.default):
        return Slotted(flat.any(1) if node.target is aten.any.default else flat.all(1))
    return Slotted(reductions[node.target](flat, [1], **kwargs))

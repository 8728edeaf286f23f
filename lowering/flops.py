"""Multiply-adds of a graph, for the share of it that coalesces."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

from torch import SymInt, Tensor
from torch.fx import Node
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

__all__ = ["flops", "flops_of"]


def flops(nodes: Iterable[Node]) -> int:
    """Floating-point operations of these nodes together; see :func:`flops_of`."""
    return sum(map(flops_of, nodes))


def flops_of(node: Node) -> int:
    """Floating-point operations of one call, by the formulas of ``torch.utils.flop_counter``.

    Convolutions, matrix products and attention count, two for a multiply-add; everything else is free.
    Symbolic sizes count as their hints, and an operation of a graph that knows no sizes counts as nothing.
    """
    target: Any = node.target
    if any("val" not in source.meta for source in (node, *node.all_input_nodes)):
        return 0
    namespace, name = getattr(target, "namespace", ""), str(target)
    if name.startswith("mux.attention") or ("scaled_dot_product" in name and "backward" not in name):
        query, key, value = (_shape(argument) for argument in node.args[:3])
        return int(sdpa_flop_count(query, key, value))
    if name.startswith("mux.block"):  # every weight meets every pixel of the image
        image = _shape(node.args[0])
        weights = cast("Sequence[Node]", node.args[1])
        return 2 * math.prod((image[0], *image[2:])) * sum(math.prod(_shape(weight)) for weight in weights)
    if namespace == "mux":
        return _super_kernel(node, name)
    if name.startswith("aten.linear."):
        return 2 * math.prod(_shape(node)) * _shape(node.args[1])[-1]
    formula = flop_registry.get(getattr(target, "overloadpacket", None))
    if formula is None:
        return 0
    arguments = [_valued(argument) for argument in node.args]
    named = {key: _valued(argument) for key, argument in node.kwargs.items()}
    return int(formula(*arguments, **named, out_val=_valued(node)))


def _super_kernel(node: Node, name: str) -> int:
    """Of ``mux::`` operations, which take the input and the weight first, output channels leading."""
    if len(node.args) < 2 or not all(isinstance(argument, Node) for argument in node.args[:2]):
        return 0
    if "linear" not in name and "conv" not in name:
        return 0
    image, weight = (_shape(argument) for argument in node.args[:2])
    if "transpose" in name:  # every input element meets the weights of its channel
        return 2 * math.prod(image) * math.prod(weight) // weight[0]
    return 2 * math.prod(_shape(node)) * math.prod(weight) // weight[0]


def _valued(argument: Any) -> Any:
    """What a formula reads: the shape where there is a tensor."""
    if isinstance(argument, Node):
        value = argument.meta.get("val")
        return _shape(argument) if isinstance(value, (Tensor, tuple, list)) else value
    return argument


def _shape(argument: Any) -> tuple[int, ...]:
    value = argument.meta["val"]
    if isinstance(value, (tuple, list)):
        value = value[0]
    return tuple(_number(size) for size in value.shape)


def _number(size: int | SymInt) -> int:
    return size if isinstance(size, int) else int(size.node.hint)

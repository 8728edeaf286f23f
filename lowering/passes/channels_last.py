"""Gives every super-kernel its weight in the memory order that it reads, by a copy only where one is needed.

``mux::convolution`` reads [O, KH, KW, C] memory, or [KH, KW, O] of a depthwise one; ``mux::linear`` any
weight with one dense dimension; an embedding whole rows. The copies depend on parameters only, so they are
made once an instance; ``torch_mux.adopt`` makes those of convolutions unnecessary, but for depthwise ones.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from torch_mux.settings import Settings

from ..graphs import call_nodes, emit, fake_of, fresh_meta, parameter_only
from ..ops.semantic import CONVOLUTION, LINEAR, is_depthwise

__all__ = ["memory_order", "run"]

aten = torch.ops.aten

EMBEDDING = aten.embedding.default


def memory_order(node: Node, weight: Tensor) -> tuple[int, ...]:
    """The dimensions of ``weight`` from the outermost in memory inwards, as the kernel of ``node`` reads it.

    A depthwise convolution reads neighbouring channels of one tap, any other those of one output channel.
    """
    if node.target is not CONVOLUTION:
        return tuple(range(weight.dim()))
    return (2, 3, 0, 1) if is_depthwise(node) else (0, 2, 3, 1)


def _needs_copy(node: Node, weight: Tensor) -> bool:
    if node.target is LINEAR:
        return 1 not in weight.stride() or min(weight.stride()) < 1
    return not weight.permute(memory_order(node, weight)).is_contiguous()


def _copy(graph: Graph, weight: Node, order: tuple[int, ...]) -> Node:
    """``weight`` with its dimensions in ``order`` in memory."""
    plain, dense = order == tuple(range(len(order))), {"memory_format": torch.contiguous_format}
    moved = weight if plain else emit(graph, aten.permute.default, (weight, list(order)))
    copied = emit(graph, aten.clone.default, (moved,), dense)
    back = [order.index(dim) for dim in range(len(order))]
    return copied if plain else emit(graph, aten.permute.default, (copied, back))


def run(module: GraphModule, settings: Settings) -> GraphModule:
    """Inserts one copy a weight and memory order, which several kernels may share."""
    copies: dict[tuple[Node, tuple[int, ...]], Node] = {}
    weights = parameter_only(module.graph)
    for node in call_nodes(module.graph):
        if node.target not in (CONVOLUTION, LINEAR, EMBEDDING):
            continue
        position = 0 if node.target is EMBEDDING else 1
        weight = node.args[position]
        if not isinstance(weight, Node) or weight not in weights or not _needs_copy(node, fake_of(weight)):
            continue
        order = memory_order(node, fake_of(weight))
        if (weight, order) not in copies:
            with module.graph.inserting_before(weight.next):
                copies[weight, order] = _copy(module.graph, weight, order)
        node.update_arg(position, copies[weight, order])
    return fresh_meta(module)

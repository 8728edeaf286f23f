"""Gives every super-kernel its weight in the memory order that it reads, by a copy only where one is needed.

``mux::convolution`` reads [O, KH, KW, C] memory; ``mux::linear`` any weight with one dense dimension; an
embedding whole rows. The copies depend on parameters only, so they are made once an instance;
``torch_mux.adopt`` makes those of convolutions unnecessary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from torch_mux.settings import Settings

from ..graphs import call_nodes, emit, fake_of, fresh_meta, parameter_only
from ..ops.semantic import CONVOLUTION, LINEAR

__all__ = ["dense_channels_last", "run"]

aten = torch.ops.aten

EMBEDDING = aten.embedding.default


def dense_channels_last(weight: Tensor) -> bool:
    """Whether a convolution weight [O, C, KH, KW] lies in memory as [O, KH, KW, C]."""
    return weight.permute(0, 2, 3, 1).is_contiguous()


def _needs_copy(node: Node, weight: Tensor) -> bool:
    if node.target is CONVOLUTION:
        return not dense_channels_last(weight)
    if node.target is EMBEDDING:
        return not weight.is_contiguous()
    return 1 not in weight.stride() or min(weight.stride()) < 1


def run(module: GraphModule, settings: Settings) -> GraphModule:
    """Inserts one ``clone`` a weight that several kernels may share."""
    copies: dict[Node, Node] = {}
    weights = parameter_only(module.graph)
    for node in call_nodes(module.graph):
        if node.target not in (CONVOLUTION, LINEAR, EMBEDDING):
            continue
        position = 0 if node.target is EMBEDDING else 1
        weight = node.args[position]
        if not isinstance(weight, Node) or weight not in weights or not _needs_copy(node, fake_of(weight)):
            continue
        layout = torch.channels_last if node.target is CONVOLUTION else torch.contiguous_format
        if weight not in copies:
            with module.graph.inserting_after(weight):
                copies[weight] = emit(module.graph, aten.clone.default, (weight,), {"memory_format": layout})
        node.update_arg(position, copies[weight])
    return fresh_meta(module)

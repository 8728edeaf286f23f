"""A convolution whose kernel tiles the image (a patch embedding) becomes a linear layer over patches."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from torch_mux.settings import Settings

from ..graphs import call_nodes, emit, fake_of, fresh_meta, shape_of
from ..ops.semantic import CONVOLUTION, LINEAR, Convolution

__all__ = ["run"]

aten = torch.ops.aten


def _is_patches(node: Node) -> bool:
    call = Convolution.of(node)
    if call.residual is not None or call.groups != 1:
        return False
    _, _, height, width = shape_of(call.x)
    kernel = list(shape_of(call.weight)[2:])
    return (
        kernel == call.stride
        and kernel != [1, 1]
        and call.padding == [0, 0]
        and call.dilation == [1, 1]
        and height % kernel[0] == 0
        and width % kernel[1] == 0
    )


def _rewritten(node: Node) -> Node:
    call = Convolution.of(node)
    x, weight = call.x, call.weight
    batch, channels, height, width = shape_of(x)
    kh, kw = shape_of(weight)[2:]
    rows, columns = height // kh, width // kw
    graph = node.graph
    with graph.inserting_before(node):
        split = emit(graph, aten.view.default, (x, [batch, channels, rows, kh, columns, kw]))
        ordered = emit(graph, aten.permute.default, (split, [0, 2, 4, 1, 3, 5]))
        dense = emit(graph, aten.clone.default, (ordered,), {"memory_format": torch.contiguous_format})
        patches = emit(graph, aten.view.default, (dense, [batch, rows * columns, channels * kh * kw]))
        if not fake_of(weight).is_contiguous():
            weight = emit(graph, aten.clone.default, (weight,), {"memory_format": torch.contiguous_format})
        flat = emit(graph, aten.view.default, (weight, [shape_of(weight)[0], channels * kh * kw]))
        result = emit(graph, LINEAR, (patches, flat, call.scale, call.shift, None, call.activation))
        image = emit(graph, aten.view.default, (result, [batch, rows, columns, shape_of(weight)[0]]))
        return emit(graph, aten.permute.default, (image, [0, 3, 1, 2]))


def run(module: GraphModule, settings: Settings) -> GraphModule:
    """The rearranged image is one copy, which the batched graph fuses with the reading of its input."""
    for node in call_nodes(module.graph):
        if node.target is CONVOLUTION and _is_patches(node):
            node.replace_all_uses_with(_rewritten(node))
            module.graph.erase_node(node)
    return fresh_meta(module)

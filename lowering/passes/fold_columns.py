"""Folds the stride along a line of an image into its channels, so that a convolution loads 16 bytes at once.

Two neighbouring pixels of four channels each are one of eight: a kernel of k columns at stride 2 is one of
``ceil(k / 2)`` columns at stride 1, with a column of zeros where k is odd. It is space-to-depth along one
axis, as implementations of ResNet for TPUs do along both. The border becomes part of the image, which is
copied anyway, so that nothing is left to mask.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from torch_mux.settings import Settings

from ..graphs import call_nodes, emit, fake_of, fresh_meta, shape_of
from ..ops.semantic import CONVOLUTION, Convolution

__all__ = ["run"]

aten = torch.ops.aten

_CHANNELS = 4  # of an image, as ``pad_channels`` leaves it
_STRIDE = 2  # of half precision: four channels of two pixels are 16 bytes


def _folds(node: Node) -> bool:
    """A function of the operation's shape and dtype alone."""
    value = fake_of(node)
    if value.device.type != "cuda" or value.dtype.itemsize != 2:
        return False
    call = Convolution.of(node)
    plain = call.groups == 1 and not call.transposed and len(call.stride) == 2 and call.dilation[1] == 1
    if not plain or call.stride[1] != _STRIDE:
        return False
    few = shape_of(call.x)[1] == _CHANNELS and shape_of(call.weight)[3] > 1
    return few and _width(node, call) >= call.padding[1] + shape_of(call.x)[3]


def _columns(call: Convolution) -> int:
    return -(-shape_of(call.weight)[3] // _STRIDE)


def _width(node: Node, call: Convolution) -> int:
    """Columns that the windows reach over, border included; fewer than there are where some are not read."""
    return _STRIDE * (shape_of(node)[3] - 1 + _columns(call))


def _dense(x: Node) -> Node:
    return emit(x.graph, aten.clone.default, (x,), {"memory_format": torch.contiguous_format})


def _image(x: Node, left: int, width: int, border: int) -> Node:
    """[B, 2 C, H + 2 border, width / 2] of ``x`` [B, C, H, W], with ``left`` columns of zeros before it."""
    graph = x.graph
    sides = [left, width - left - shape_of(x)[3], border, border]
    padded = emit(graph, aten.constant_pad_nd.default, (x, sides))
    pixels = _dense(emit(graph, aten.permute.default, (padded, [0, 2, 3, 1])))
    batch, lines, _, channels = shape_of(pixels)
    pairs = [batch, lines, width // _STRIDE, _STRIDE * channels]
    return emit(graph, aten.permute.default, (emit(graph, aten.view.default, (pixels, pairs)), [0, 3, 1, 2]))


def _weight(weight: Node, columns: int) -> Node:
    """[O, 2 C, KH, columns] of a weight [O, C, KH, KW]."""
    graph = weight.graph
    outputs, channels, lines, taps = shape_of(weight)
    padded = emit(graph, aten.constant_pad_nd.default, (weight, [0, columns * _STRIDE - taps]))
    dense = padded if fake_of(padded).is_contiguous() else _dense(padded)
    split = emit(graph, aten.view.default, (dense, [outputs, channels, lines, columns, _STRIDE]))
    folded = _dense(emit(graph, aten.permute.default, (split, [0, 4, 1, 2, 3])))
    return emit(graph, aten.view.default, (folded, [outputs, _STRIDE * channels, lines, columns]))


def _rewritten(node: Node) -> Node:
    call = Convolution.of(node)
    with node.graph.inserting_before(node):
        x = _image(call.x, call.padding[1], _width(node, call), call.padding[0])
        weight = _weight(call.weight, _columns(call))
        folded = call._replace(x=x, weight=weight, stride=[call.stride[0], 1], padding=[0, 0])
        return emit(node.graph, CONVOLUTION, tuple(folded))


def run(module: GraphModule, settings: Settings) -> GraphModule:
    """On CUDA only. The folded weight is prepared once an instance."""
    for node in call_nodes(module.graph):
        if node.target is CONVOLUTION and _folds(node):
            node.replace_all_uses_with(_rewritten(node))
            module.graph.erase_node(node)
    return fresh_meta(module)

"""Convolutions and GEMMs over prepared weights become ``mux::convolution`` and ``mux::linear``."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.fx import Graph, GraphModule, Node

from torch_mux.settings import Settings

from ..graphs import call_nodes, emit, fake_of, fresh_meta, parameter_only, shape_of
from ..ops.semantic import CONVOLUTION, LINEAR, Convolution

__all__ = ["run"]

aten = torch.ops.aten

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _floating(*nodes: Node) -> bool:
    dtypes = {fake_of(node).dtype for node in nodes}
    return len(dtypes) == 1 and dtypes <= set(_DTYPES)


def _transposed(graph: Graph, weight: Node) -> Node:
    """``weight.t()``, looking through a transpose that is already there."""
    if weight.target is aten.t.default and isinstance(weight.args[0], Node):
        return weight.args[0]
    return emit(graph, aten.t.default, (weight,))


def _linear(graph: Graph, x: Any, weight: Any, bias: Any) -> Node:
    return emit(graph, LINEAR, (x, _transposed(graph, weight), None, bias, None, "none"))


def _restore_leading(kernel: Node) -> None:
    """``view(linear(view(x)))`` becomes ``linear(x)`` where the views only touch leading dimensions.

    Residuals and biases then meet the kernel in the model's own shape.
    """
    views = (aten.view.default, aten._unsafe_view.default)
    if len(kernel.users) != 1:
        return
    view = next(iter(kernel.users))
    x = kernel.args[0]
    if view.target not in views or shape_of(view)[-1] != shape_of(kernel)[-1] or not isinstance(x, Node):
        return
    shape = [*shape_of(view)[:-1], shape_of(x)[-1]]
    with kernel.graph.inserting_before(kernel):
        source = x.args[0] if x.target in views else None
        if isinstance(source, Node) and list(shape_of(source)) == shape:
            x = source
        else:
            x = emit(kernel.graph, aten.view.default, (x, shape))
        restored = emit(kernel.graph, LINEAR, (x, *kernel.args[1:]))
    view.replace_all_uses_with(restored)
    kernel.graph.erase_node(view)
    kernel.graph.erase_node(kernel)


def _select_matmul(node: Node, weights: set[Node]) -> Node | None:
    """``mm(x, w)`` and ``addmm(bias, x, w)`` with a one-dimensional bias."""
    bias: Any = None
    if node.target is aten.mm.default:
        x, weight = node.args
    elif node.target is aten.addmm.default and not node.kwargs:
        bias, x, weight = node.args
        if not isinstance(bias, Node) or bias not in weights or not isinstance(weight, Node):
            return None
        if len(shape_of(bias)) != 1 or shape_of(bias)[0] != shape_of(weight)[1]:
            return None
    else:
        return None
    if not isinstance(x, Node) or not isinstance(weight, Node) or weight not in weights or x in weights:
        return None
    if not _floating(x, weight):
        return None
    with node.graph.inserting_before(node):
        return _linear(node.graph, x, weight, bias)


def _select_convolution(node: Node, weights: set[Node]) -> Node | None:
    """Over one or two spatial dimensions, grouped or not, transposed or not."""
    if node.target is not aten.convolution.default:
        return None
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = node.args
    if not isinstance(x, Node) or not isinstance(weight, Node) or weight not in weights or x in weights:
        return None
    rank = len(shape_of(x)) - 2
    if rank not in (1, 2) or not _floating(x, weight):
        return None
    if isinstance(bias, Node) and bias not in weights:
        return None

    def each(value: Any) -> list[int]:
        return [int(value[0]), int(value[-1])][-rank:]

    with node.graph.inserting_before(node):
        call = Convolution(
            x=x, weight=weight, scale=None, shift=bias, residual=None, stride=each(stride),
            padding=each(padding), dilation=each(dilation), transposed=bool(transposed),
            output_padding=each(output_padding), groups=cast("int", groups), activation="none",
        )  # fmt: skip
        return emit(node.graph, CONVOLUTION, tuple(call))


def run(module: GraphModule, settings: Settings) -> GraphModule:
    """The bias becomes the epilogue's shift; three-dimensional convolutions stay ATen's."""
    weights = parameter_only(module.graph)
    for node in call_nodes(module.graph):
        chosen = _select_matmul(node, weights) or _select_convolution(node, weights)
        if chosen is not None:
            node.replace_all_uses_with(chosen)
            module.graph.erase_node(node)
    for node in call_nodes(module.graph):
        if node.target is LINEAR:
            _restore_leading(node)
    return fresh_meta(module)

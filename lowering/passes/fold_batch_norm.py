"""Batch normalisation of inference becomes a scale and a shift a channel.

They go into the epilogue of the convolution before it when that is its only reader, and into one multiply-add
otherwise. Both are computed from parameters and buffers only, in float32, once an instance.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.fx import Graph, GraphModule, Node

from torch_mux.settings import Settings

from ..graphs import call_nodes, emit, fake_of, fresh_meta, parameter_only
from ..ops.semantic import CONVOLUTION, LINEAR

__all__ = ["run"]

aten = torch.ops.aten


def _statistics(node: Node) -> tuple[Any, Any, Any, Any, float] | None:
    """(weight, bias, mean, variance, epsilon) of an inference batch norm, or None."""
    if node.target is aten._native_batch_norm_legit_no_training.default:
        _, weight, bias, mean, variance, _, epsilon = node.args
    elif node.target is aten.native_batch_norm.default and node.args[5] is False:
        _, weight, bias, mean, variance, _, _, epsilon = node.args
    else:
        return None
    return weight, bias, mean, variance, float(cast(float, epsilon))


def _wide(graph: Graph, value: Any) -> Any:
    """``value`` in float32, or as it is where it is wider already or None."""
    if not isinstance(value, Node) or fake_of(value).dtype in (torch.float32, torch.float64):
        return value
    return emit(graph, aten._to_copy.default, (value,), {"dtype": torch.float32})


def _scale_and_shift(graph: Graph, statistics: tuple[Any, ...], convolution_bias: Any) -> tuple[Node, Node]:
    weight, bias, mean, variance = (_wide(graph, value) for value in statistics[:4])
    epsilon = statistics[4]
    scale = emit(graph, aten.rsqrt.default, (emit(graph, aten.add.Scalar, (variance, epsilon)),))
    if weight is not None:
        scale = emit(graph, aten.mul.Tensor, (scale, weight))
    centre = mean
    if convolution_bias is not None:
        centre = emit(graph, aten.sub.Tensor, (mean, _wide(graph, convolution_bias)))
    shift = emit(graph, aten.mul.Tensor, (emit(graph, aten.neg.default, (centre,)), scale))
    if bias is not None:
        shift = emit(graph, aten.add.Tensor, (shift, bias))
    return scale, shift


def _channel_view(graph: Graph, vector: Node, rank: int) -> Node:
    return emit(graph, aten.view.default, (vector, [-1, *([1] * (rank - 2))]))


def _fold(node: Node, statistics: tuple[Any, ...], weights: set[Node]) -> Node | None:
    source = node.args[0]
    if not isinstance(source, Node) or any(
        isinstance(arg, Node) and arg not in weights for arg in node.args[1:5]
    ):
        return None
    if any(user.args[1] != 0 for user in node.users):
        return None
    graph = node.graph
    folds = (
        (source.target is CONVOLUTION or (source.target is LINEAR and fake_of(source).dim() == 2))
        and len(source.users) == 1
        and source.args[2] is None
        and source.args[4] is None
        and source.args[-1] == "none"
    )
    with graph.inserting_before(node):
        scale, shift = _scale_and_shift(graph, statistics, source.args[3] if folds else None)
        if folds:
            target: Any = source.target
            return emit(graph, target, (*source.args[:2], scale, shift, *source.args[4:]))
        rank = fake_of(source).dim()
        scaled = emit(graph, aten.mul.Tensor, (source, _channel_view(graph, scale, rank)))
        shifted = emit(graph, aten.add.Tensor, (scaled, _channel_view(graph, shift, rank)))
        if fake_of(shifted).dtype == fake_of(source).dtype:
            return shifted
        return emit(graph, aten._to_copy.default, (shifted,), {"dtype": fake_of(source).dtype})


def run(module: GraphModule, settings: Settings) -> GraphModule:
    """Handles inference batch norms whose statistics are parameters or buffers; others stay."""
    weights = parameter_only(module.graph)
    for node in call_nodes(module.graph):
        statistics = _statistics(node)
        if statistics is None:
            continue
        folded = _fold(node, statistics, weights)
        if folded is None:
            continue
        for user in list(node.users):
            user.replace_all_uses_with(folded)
            module.graph.erase_node(user)
        module.graph.erase_node(node)
        weights = parameter_only(module.graph)
    return fresh_meta(module)

"""Moves the bias, the residual and the activation that follow a super-kernel into its epilogue.

``act(acc * scale + shift + residual)`` is all an epilogue can do, so the order of the fusion is fixed: a bias
while there is no residual, a residual while there is no activation, then one activation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from torch_mux.settings import Settings

from ..graphs import call_nodes, emit, fake_of, fresh_meta, parameter_only, shape_of
from ..ops.semantic import CONVOLUTION, LINEAR

__all__ = ["activation_of", "run"]

aten = torch.ops.aten

_SIMPLE = {
    aten.relu.default: "relu",
    aten.silu.default: "silu",
    aten.hardswish.default: "hardswish",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
}
_SCALE, _SHIFT, _RESIDUAL = 2, 3, 4


def activation_of(node: Node) -> str | None:
    """The epilogue's name for the activation that ``node`` applies, or None."""
    if node.target in _SIMPLE:
        return _SIMPLE[node.target]
    if node.target is aten.gelu.default:
        return "gelu_tanh" if node.kwargs.get("approximate", "none") == "tanh" else "gelu"
    if node.target in (aten.hardtanh.default, aten.clamp.default) and tuple(node.args[1:]) == (0, 6):
        return "relu6"
    if node.target in (aten.hardtanh.default, aten.clamp.default) and tuple(node.args[1:]) == (0.0, 6.0):
        return "relu6"
    return None


def _is_kernel(value: Any) -> bool:
    return isinstance(value, Node) and value.target in (CONVOLUTION, LINEAR)


def _rewritten(kernel: Node, at: Node, position: int, value: Any) -> Node:
    args = list(kernel.args)
    args[position] = value
    with at.graph.inserting_before(at):
        target: Any = kernel.target
        return emit(at.graph, target, tuple(args))


def _fuse_activation(node: Node) -> Node | None:
    name = activation_of(node)
    kernel = node.args[0] if node.args else None
    if name is None or not isinstance(kernel, Node) or not _is_kernel(kernel):
        return None
    if len(kernel.users) != 1 or kernel.args[-1] != "none":
        return None
    return _rewritten(kernel, node, len(kernel.args) - 1, name)


def _normalised(node: Node) -> bool:
    """Whether a layer norm reads a sum: it adds in float32 itself, an epilogue would round the sum first.

    A rounded sum costs half-precision transformers more error than Inductor has.
    """
    return any(user.target is aten.native_layer_norm.default for user in node.users)


def _addend(node: Node, kernel: Any, other: Any, weights: set[Node]) -> Node | None:
    if not _is_kernel(kernel) or not isinstance(other, Node) or len(kernel.users) != 1:
        return None
    if kernel.args[-1] != "none" or kernel.args[_RESIDUAL] is not None:
        return None
    if fake_of(node).dtype != fake_of(kernel).dtype or shape_of(node) != shape_of(kernel):
        return None
    is_bias = other in weights and kernel.target is LINEAR and shape_of(other) == shape_of(kernel)[-1:]
    if is_bias and kernel.args[_SHIFT] is None:
        return _rewritten(kernel, node, _SHIFT, other)
    if _normalised(node):
        return None
    if (
        other not in weights
        and shape_of(other) == shape_of(kernel)
        and fake_of(other).dtype == fake_of(kernel).dtype
    ):
        return _rewritten(kernel, node, _RESIDUAL, other)
    return None


def _ends_a_branch(value: Any) -> bool:
    """Whether ``value`` is of a kernel that alone reads its input, as a shortcut past a branch does not.

    Of two kernels whose results are added, the branch's takes the sum, so that it stays a chain.
    """
    return _is_kernel(value) and len(value.args[0].users) == 1


def _fuse_addition(node: Node, weights: set[Node]) -> Node | None:
    if node.target is not aten.add.Tensor or node.kwargs.get("alpha", 1) != 1 or len(node.args) != 2:
        return None
    left, right = node.args
    if left is right:
        return None
    if _ends_a_branch(left) and not _ends_a_branch(right):
        left, right = right, left
    return _addend(node, right, left, weights) or _addend(node, left, right, weights)


def run(module: GraphModule, settings: Settings) -> GraphModule:
    """One sweep in program order; each fusion re-issues the kernel at the place of what it absorbed."""
    weights = parameter_only(module.graph)
    for node in call_nodes(module.graph):
        fused = _fuse_addition(node, weights) or _fuse_activation(node)
        if fused is None:
            continue
        node.replace_all_uses_with(fused)
        module.graph.erase_node(node)
    return fresh_meta(module)

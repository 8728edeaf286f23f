"""Attention of one slot, in whatever kernel PyTorch picked, becomes ``mux::attention`` where it is ours.

By the shape of the operation alone (:func:`choose_attention.owned`), so that a bundle never decides it. On
the CPU every shape is taken: there the slots of ``mux::slot_attention`` are vendor calls.
"""

from __future__ import annotations

import operator
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from torch_mux.settings import Settings

from ..graphs import call_nodes, emit, fake_of, fresh_meta
from ..kernels import choose_attention
from ..ops.attention import ATTENTION

__all__ = ["run"]

aten = torch.ops.aten

_ON_CPU: Final = aten._scaled_dot_product_flash_attention_for_cpu.default
#: Vendor operation → the name of its mask.
_VENDOR: Final[dict[Any, str]] = {
    _ON_CPU: "attn_mask",
    aten._scaled_dot_product_flash_attention.default: "",
    aten._scaled_dot_product_efficient_attention.default: "attn_bias",
    aten._scaled_dot_product_cudnn_attention.default: "attn_bias",
    aten._scaled_dot_product_fused_attention_overrideable.default: "attn_bias",
}


def _given(node: Node) -> dict[str, Any]:
    """The arguments of an operation by name, defaults included."""
    target: Any = node.target
    arguments = target._schema.arguments
    defaults = {each.name: each.default_value for each in arguments if each.has_default_value()}
    return defaults | dict(zip((each.name for each in arguments), node.args, strict=False)) | node.kwargs


def _ours(node: Node, given: dict[str, Any]) -> bool:
    """Nothing but the result is read, nothing is drawn, and the kernel takes operands of these kinds."""
    if given.get("dropout_p", 0.0) != 0.0 or given.get("return_debug_mask", False):
        return False
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users):
        return False
    query, key, value = (fake_of(given[name]) for name in ("query", "key", "value"))
    mask = given.get(_VENDOR[node.target])
    if mask is not None and not fake_of(mask).is_floating_point():
        return False
    if query.dim() != 4 or {key.dtype, value.dtype} != {query.dtype} or query.shape[0] != key.shape[0]:
        return False
    if query.shape[1] % max(1, key.shape[1]) != 0 or key.shape[1] != value.shape[1]:
        return False
    masked = mask is not None
    return node.target is _ON_CPU or choose_attention.owned(_size(query, value), query.dtype, masked)


def _size(query: Tensor, value: Tensor) -> choose_attention.Size:
    queries, channels = query.shape[-2:]
    keys, out_channels = value.shape[-2:]
    return choose_attention.Size(int(queries), int(keys), int(channels), int(out_channels))


def _unexpanded(mask: Node) -> Node:
    """What an expanded mask was before: its repeated elements need not be read."""
    while mask.target is aten.expand.default and isinstance(mask.args[0], Node):
        mask = mask.args[0]
    return mask


def run(module: GraphModule, settings: Settings) -> GraphModule:
    """Masks are additive here: PyTorch turns boolean ones into numbers before it calls a vendor kernel."""
    for node in call_nodes(module.graph):
        if node.target not in _VENDOR:
            continue
        given = _given(node)
        if not _ours(node, given):
            continue
        mask = given.get(_VENDOR[node.target])
        if mask is not None:
            mask = _unexpanded(mask)
        operands = (given["query"], given["key"], given["value"], mask)
        with module.graph.inserting_before(node):
            ours = emit(module.graph, ATTENTION, (*operands, bool(given["is_causal"]), given.get("scale")))
        for user in list(node.users):
            user.replace_all_uses_with(ours)
            module.graph.erase_node(user)
        module.graph.erase_node(node)
    return fresh_meta(module)

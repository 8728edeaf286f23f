"""Removes what means nothing at inference: detach, alias, lift, inactive dropout, idle casts and clones."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from torch_mux.settings import Settings

from ..graphs import call_nodes, fake_of, fresh_meta, restrides_only

__all__ = ["run"]

aten = torch.ops.aten

_TRANSPARENT = {aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default, aten.lift.default}


def _same_layout(node: Node, source: Node) -> bool:
    left, right = fake_of(node), fake_of(source)
    return (
        left.dtype == right.dtype
        and left.device == right.device
        and tuple(left.shape) == tuple(right.shape)
        and tuple(left.stride()) == tuple(right.stride())
    )


def _replacement(node: Node) -> Node | None:
    """The node whose value ``node`` merely repeats, or None."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node):
        return None
    if node.target in _TRANSPARENT or restrides_only(node):
        return source
    if node.target in (aten.clone.default, aten._to_copy.default, aten.expand.default, aten.view.default):
        return source if _same_layout(node, source) else None
    if node.target is aten.dropout.default and not node.args[2]:
        return source
    return None


def run(module: GraphModule, settings: Settings) -> GraphModule:
    """Functional graphs only: a clone may be dropped because nothing writes its source or its result.

    A clone that becomes a graph output stays, so that no output shares storage with another value.
    """
    returned = {
        node for output in module.graph.nodes if output.op == "output" for node in output.all_input_nodes
    }
    for node in call_nodes(module.graph):
        source = _replacement(node)
        if source is not None and not (
            node in returned and (source in returned or source.op == "placeholder")
        ):
            node.replace_all_uses_with(source)
            if node in returned:
                returned.add(source)
            module.graph.erase_node(node)
    return fresh_meta(module)

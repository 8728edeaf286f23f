"""A call that was made before is not made again: every layer of a transformer makes its mask anew."""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import GraphModule, Node

from torch_mux.settings import Settings

from ..graphs import call_nodes, fresh_meta, is_random, outputs_of, tensors_in

__all__ = ["run"]


def _key(node: Node) -> tuple[Any, ...] | None:
    """Equal for calls with one result; None for those that stand for themselves: a user's may do more."""
    target = node.target
    if is_random(node):
        return None
    if target is not operator.getitem and getattr(target, "namespace", "") not in ("aten", "prims"):
        return None
    return target, repr(node.args), repr(node.kwargs)  # a node by its name, which is its own


def run(module: GraphModule, settings: Settings) -> GraphModule:
    """What is returned stays, so that no two outputs share storage."""
    returned = set(tensors_in(outputs_of(module.graph)))
    known: dict[tuple[Any, ...], Node] = {}
    for node in call_nodes(module.graph):
        key = _key(node)
        if key is None:
            continue
        first = known.setdefault(key, node)
        if first is not node and node not in returned:
            node.replace_all_uses_with(first)
            module.graph.erase_node(node)
    return fresh_meta(module)

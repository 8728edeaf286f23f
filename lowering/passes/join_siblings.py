"""Linear layers of one input (queries, keys and values) become one launch over several weights.

What one layer reads and computes is unchanged, so that each result has the bits that a launch of its own
would give: a tile belongs to one weight, and only layers whose bit class is the same are joined.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Final, cast

from torch.fx import GraphModule, Node

from torch_mux.settings import Settings

from ..graphs import call_nodes, emit, fake_of, fresh_meta, hoist, parameter_only, shape_of
from ..kernels import choose
from ..ops.semantic import CONVOLUTION, LINEAR, LINEARS

__all__ = ["run"]

#: Results of one launch are one buffer, which lives as long as the last of them is read.
_MOST: Final = 8


def _key(node: Node, weights: set[Node]) -> tuple[Any, ...] | None:
    """What siblings agree in, or None for a layer that stays alone.

    A result that another kernel reads would have to be copied out of the joint buffer first.
    """
    x, weight, scale, shift, residual, activation = cast("tuple[Any, ...]", node.args)
    if scale is not None or residual is not None or weight not in weights or x in weights:
        return None
    if any(user.target in (LINEAR, CONVOLUTION) for user in node.users):
        return None
    n, k = shape_of(weight)
    rows, dtype = math.prod(shape_of(x)[:-1]), fake_of(x).dtype
    bits = choose.linear_class([(rows, n, k)], dtype, allow_tf32=True)
    k_major = fake_of(weight).stride(1) == 1
    return x, activation, None if shift is None else fake_of(shift).dtype, k_major, bits


def _join(siblings: Sequence[Node], weights: set[Node]) -> None:
    first, graph = siblings[0], siblings[0].graph
    x, activation = first.args[0], first.args[-1]
    matrices = [cast("Node", node.args[1]) for node in siblings]
    shifts = [cast("Node", node.args[3]) for node in siblings if node.args[3] is not None]
    hoist(graph, [*matrices, *shifts], weights, first)
    with graph.inserting_before(first):
        joined = emit(graph, LINEARS, (x, matrices, shifts, activation))
        results = [emit(graph, operator.getitem, (joined, index)) for index in range(len(siblings))]
    for node, result in zip(siblings, results, strict=True):
        node.replace_all_uses_with(result)
        graph.erase_node(node)


def run(module: GraphModule, settings: Settings) -> GraphModule:
    """Last of all passes: epilogues are complete, and weights have the memory order that they keep."""
    weights = parameter_only(module.graph)
    found: dict[tuple[Any, ...], list[Node]] = defaultdict(list)
    for node in call_nodes(module.graph):
        key = _key(node, weights) if node.target is LINEAR else None
        if key is not None:
            found[key].append(node)
    for alike in found.values():
        for start in range(0, len(alike), _MOST):
            siblings = alike[start : start + _MOST]
            if len(siblings) > 1:
                _join(siblings, weights)
    return fresh_meta(module)

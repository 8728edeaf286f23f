"""Outputs that are views of something the caller holds: they are made outside of the plan.

A plan writes every output into storage of its own, while a model may return a view of an input or a
parameter, or two views of one value. The value behind such views is computed once, as an output that nobody
sees if the model does not return it, and the views are made of it by the operations of the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .graphs import ROLE, dead_code, outputs_of, placeholders

__all__ = ["Derived", "Unresolved", "resolve_views"]

#: A view of the value before it: operation and what follows its first argument.
_Step = tuple[Any, tuple[Any, ...], dict[str, Any]]


class Unresolved(Exception):
    """An output shares storage in a way that only the graph as a whole can repeat; the message names it."""


@dataclass(frozen=True)
class Derived:
    """One output as a view.

    Attributes:
        kind: "input", "parameter" or "output": what it is a view of.
        index: which.
        steps: the views, one of another.
    """

    kind: str
    index: int
    steps: tuple[_Step, ...]

    def of(self, inputs: Sequence[Any], parameters: Sequence[Tensor], outputs: Sequence[Any]) -> Any:
        """The view, over one request's tensors."""
        value = {"input": inputs, "parameter": parameters, "output": outputs}[self.kind][self.index]
        for target, args, kwargs in self.steps:
            value = target(value, *args, **kwargs)
        return value


def _viewed(node: Node) -> Node | None:
    """The node that ``node`` is a view of, as far as its schema tells; None where it has its own storage."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    for argument, schema in zip(node.args, node.target._schema.arguments, strict=False):
        if isinstance(argument, Node) and schema.alias_info is not None and not schema.alias_info.is_write:
            return argument
    return None


def _chain(node: Node) -> tuple[Node, tuple[Node, ...]]:
    """The node whose storage ``node``'s value shares, and the views from it to ``node``."""
    views: list[Node] = []
    while True:
        split = node.args[0] if node.target is operator.getitem else None
        if isinstance(split, Node) and _viewed(split) is not None:
            views.append(node)
            node = split
        source = _viewed(node)
        if source is None:
            return node, tuple(reversed(views))
        views.append(node)
        node = source


def _steps(views: tuple[Node, ...]) -> tuple[_Step, ...]:
    if any(len(view.all_input_nodes) != 1 or not isinstance(view.args[0], Node) for view in views):
        raise Unresolved(str(views[-1]))
    return tuple((view.target, tuple(view.args[1:]), dict(view.kwargs)) for view in views)


def resolve_views(module: GraphModule) -> tuple[tuple[Derived | None, ...], int]:
    """Takes outputs that share storage with a placeholder or each other out of a graph; changes ``module``.

    Returns:
        (for every output how it is derived, or None where the graph computes it, and nothing at all where it
        computes every one; how many outputs were added at the end, from which others are derived).

    Raises:
        Unresolved: an output shares storage with a constant, or everything that is returned is a view.
    """
    values = outputs_of(module.graph)
    roots: dict[Node, list[int]] = {}
    chains: dict[int, tuple[Node, ...]] = {}
    for position, value in enumerate(values):
        if isinstance(value, Node):
            root, chains[position] = _chain(value)
            roots.setdefault(root, []).append(position)
    kinds = {"input": 0, "parameter": 0}
    arguments: dict[Node, tuple[str, int]] = {}
    for node in placeholders(module.graph):
        arguments[node] = (node.meta[ROLE], kinds[node.meta[ROLE]])
        kinds[node.meta[ROLE]] += 1
    derived: list[Derived | None] = [None] * len(values)
    added: list[Node] = []
    for root, positions in roots.items():
        if root.op == "get_attr":
            raise Unresolved(str(values[positions[0]]))
        if root.op != "placeholder" and len(positions) == 1:
            continue
        source = arguments.get(root)
        if source is None:
            whole = next((position for position in positions if values[position] is root), None)
            if whole is None:
                whole = len(values) + len(added)
                added.append(root)
            source = ("output", whole)
        for position in positions:
            if source != ("output", position):
                derived[position] = Derived(*source, _steps(chains[position]))
    if not any(derived):
        return (), 0
    kept = [None if derived[position] else value for position, value in enumerate(values)]
    if not any(isinstance(value, Node) for value in (*kept, *added)):
        raise Unresolved(str(next(value for value in values if isinstance(value, Node))))
    output = next(node for node in module.graph.nodes if node.op == "output")
    output.args = ((*kept, *added),)
    dead_code(module.graph)
    module.recompile()
    return (*derived, *([None] * len(added))), len(added)

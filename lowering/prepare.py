"""Splits a graph into what depends on parameters only (once an instance) and the body that a request runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from torch_mux.types import TensorSpec

from .batch_vectors import batch_vectors
from .graphs import ROLE, call_nodes, dead_code, fake_of, parameter_only, placeholders, tensors_in

__all__ = ["INDEX", "Prepare", "dependent", "split_prepare"]

#: ``placeholder.meta[INDEX]``: which request input or which prepared value a body's placeholder is.
INDEX = "mux_index"

#: Their schemas promise an alias, but they copy where strides do not allow one.
_MAY_COPY = (
    torch.ops.aten.reshape.default,
    torch.ops.aten.contiguous.default,
    torch.ops.aten.flatten.using_ints,
)


@dataclass(frozen=True)
class Prepare:
    """The parameter-only part of a program.

    Attributes:
        module: takes the program's parameters in order, returns the values.
        specs: one TensorSpec a value.
        sources: for each value the positions of the parameters that it is computed from.
        direct: for each value whether it is a parameter or a view of one: it then follows in-place writes by
            itself.
    """

    module: Callable[..., Any]
    specs: tuple[TensorSpec, ...]
    sources: tuple[tuple[int, ...], ...]
    direct: tuple[bool, ...]

    def run(self, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The values of one instance; direct ones alias ``parameters``."""
        with torch.no_grad():
            return cast("tuple[Tensor, ...]", self.module(*parameters))


def dependent(graph: Graph) -> set[Node]:
    """Parameter-only nodes that do depend on a parameter, not on constants alone."""
    candidates = parameter_only(graph)
    found: set[Node] = set()
    for node in graph.nodes:
        if node in candidates and (
            node.op == "placeholder"
            or any(source in found for source in tensors_in((node.args, tuple(node.kwargs.values()))))
        ):
            found.add(node)
    return found


def _ancestors(nodes: Sequence[Node]) -> set[Node]:
    """``nodes`` and everything that they are computed from."""
    seen: set[Node] = set()
    pending = list(nodes)
    while pending:
        current = pending.pop()
        if current not in seen:
            seen.add(current)
            pending.extend(current.all_input_nodes)
    return seen


def _sources(node: Node, positions: dict[Node, int]) -> tuple[int, ...]:
    return tuple(sorted(positions[source] for source in _ancestors([node]) if source in positions))


def _is_view(node: Node, positions: dict[Node, int]) -> bool:
    while node not in positions:
        target = node.target
        if (
            not isinstance(target, torch._ops.OpOverload)
            or not node.args
            or not isinstance(node.args[0], Node)
        ):
            return False
        if target in _MAY_COPY:
            return False
        first = target._schema.arguments[0].alias_info
        if first is None or first.is_write:
            return False
        node = node.args[0]
    return True


def split_prepare(module: GraphModule) -> tuple[Prepare, GraphModule]:
    """(prepare, body); the body's placeholders carry ``meta[ROLE]``, "input" or "value", ``meta[INDEX]``."""
    graph = module.graph
    inside = dependent(graph)
    arguments = placeholders(graph)
    parameters = [node for node in arguments if node.meta[ROLE] == "parameter"]
    positions = {node: i for i, node in enumerate(parameters)}
    frontier = [
        node
        for node in graph.nodes
        if node in inside
        and isinstance(node.meta.get("val"), Tensor)
        and any(user not in inside for user in node.users)
    ]
    prepared = Graph()
    mapping: dict[Node, Node] = {}
    needed = _ancestors(frontier) | set(parameters)
    for node in graph.nodes:
        if node in needed:
            mapping[node] = prepared.node_copy(node, lambda source: mapping[source])
    prepared.output(tuple(mapping[node] for node in frontier))
    dead_code(prepared)
    prepare_module = GraphModule(module, batch_vectors(prepared))
    dead_code(prepare_module.graph)
    prepare_module.recompile()
    prepare = Prepare(
        prepare_module,
        tuple(TensorSpec.of(fake_of(node)) for node in frontier),
        tuple(_sources(node, positions) for node in frontier),
        tuple(_is_view(node, positions) for node in frontier),
    )
    return prepare, _body(module, frontier)


def _body(module: GraphModule, frontier: Sequence[Node]) -> GraphModule:
    graph = module.graph
    inputs = [node for node in placeholders(graph) if node.meta[ROLE] == "input"]
    for index, node in enumerate(inputs):
        node.meta[INDEX] = index
    first = next(iter(graph.nodes))
    for index, node in enumerate(frontier):
        with graph.inserting_before(first):
            value = graph.placeholder(f"value_{index}")
        value.meta.update({"val": node.meta["val"], ROLE: "value", INDEX: index})
        node.replace_all_uses_with(value)
    for node in reversed(call_nodes(graph)):
        if not node.users:
            graph.erase_node(node)
    for node in placeholders(graph):
        if node.meta[ROLE] == "parameter" and not node.users:
            graph.erase_node(node)
    body = GraphModule(module, graph)
    dead_code(body.graph)
    body.recompile()
    return body

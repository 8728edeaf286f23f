"""Cuts a body into coalesced and per-instance segments, and traces each."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from torch_mux import compat
from torch_mux.types import TensorSpec

from .coalesce import SlotSpace, dense_order, evaluate, parameter_of
from .graphs import ROLE, fake_of, outputs_of, parameter_only, tensors_in
from .rules import Slotted
from .storage import Layout

__all__ = ["Segment", "cut", "single_slot", "trace"]


@dataclass(frozen=True)
class Segment:
    """A run of operations between values with a slot axis.

    Attributes:
        coalesced: whether it reads the tables; otherwise it runs once a slot.
        nodes: the body's operations in order, with the constants they need.
        inputs: values from outside: request inputs and other segments' results.
        parameters: prepared values that it reads.
        results: its values that other segments or the output read.
    """

    coalesced: bool
    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    parameters: tuple[Node, ...]
    results: tuple[Node, ...]


def cut(body: GraphModule, alone: Collection[Node]) -> list[Segment]:
    """Segments in an order in which each finds its inputs ready; as few as the dependencies allow.

    A node's stage is the smallest that is not before any of its operands' and has its kind: even stages are
    coalesced, odd ones per instance. What is returned and does not depend on the request belongs to stage 0.
    """
    constants = {node for node in parameter_only(body.graph) if node.op != "placeholder"}
    stages: dict[Node, int] = {}
    for node in body.graph.nodes:
        if node.op != "call_function" or node in constants:
            continue
        stage = max((stages[source] for source in node.all_input_nodes if source in stages), default=0)
        stages[node] = stage + ((stage % 2 == 1) != (node in alone))
    returned = set(tensors_in(outputs_of(body.graph)))
    lifted = {node for node in body.graph.nodes if node in returned and node not in stages}
    return [
        _segment(
            body,
            [node for node in stages if stages[node] == stage],
            constants,
            returned,
            stage % 2 == 0,
            lifted if stage == 0 else set(),
        )
        for stage in sorted({*stages.values(), *([0] if lifted else [])})
    ]


def _segment(
    body: GraphModule,
    members: Sequence[Node],
    constants: set[Node],
    returned: set[Node],
    coalesced: bool,
    lifted: set[Node],
) -> Segment:
    inside = set(members)
    needed = lifted & constants
    pending = [*members, *needed]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source in constants and source not in needed:
                needed.add(source)
                pending.append(source)
    nodes = tuple(node for node in body.graph.nodes if node in inside or node in needed)
    outside = {
        source for node in members for source in node.all_input_nodes if source not in inside | constants
    } | (lifted - constants)
    ordered = [node for node in body.graph.nodes if node in outside]
    results = tuple(node for node in body.graph.nodes if node in lifted) + tuple(
        node for node in members if node in returned or any(user not in inside for user in node.users)
    )
    return Segment(
        coalesced,
        nodes,
        tuple(node for node in ordered if node.meta.get(ROLE) != "value"),
        tuple(node for node in ordered if node.meta.get(ROLE) == "value"),
        results,
    )


def trace(
    body: GraphModule,
    segment: Segment,
    layout: Layout,
    device: torch.device,
    key: str,
    allow_tf32: tuple[bool, bool],
) -> tuple[GraphModule, SlotSpace, list[Tensor]]:
    """The batched graph of a coalesced segment: (tables…, [T, …] inputs…) → [T, …] results, dense a slot."""
    space = SlotSpace.create(device, layout)
    fakes = [*space.arguments, *(space.stacked(TensorSpec.of(fake_of(node))) for node in segment.inputs)]
    count = len(space.arguments)

    def run(*arguments: Tensor) -> tuple[Tensor, ...]:
        context = space.context(arguments[:count], layout, key, allow_tf32)
        values: dict[Node, Any] = dict(zip(segment.inputs, map(Slotted, arguments[count:]), strict=True))
        values.update((node, parameter_of(node)) for node in segment.parameters)
        for node in segment.nodes:
            values[node] = evaluate(context, body, node, values)
        return tuple(_dense(context.lift(values[node]), node) for node in segment.results)

    with space.shapes.tracing():
        graph = compat.trace_graph(run, fakes)
    return graph, space, fakes


def _dense(value: Tensor, node: Node) -> Tensor:
    """[T, *shape] with each slot dense in the memory order of one slot's value."""
    order = dense_order(TensorSpec.of(fake_of(node)))
    inner = value.permute(0, *(dim + 1 for dim in order)).contiguous()
    return inner.permute(0, *(order.index(dim) + 1 for dim in range(len(order))))


def single_slot(body: GraphModule, segment: Segment) -> GraphModule:
    """A per-instance segment as a graph of its own: (inputs…, prepared values…) → results, for one slot."""
    graph = Graph()
    mapping: dict[Node, Node] = {}
    for node in (*segment.inputs, *segment.parameters):
        mapping[node] = graph.placeholder(node.name)
        mapping[node].meta["val"] = _dense_fake(node) if node in segment.inputs else node.meta["val"]
    for node in segment.nodes:
        mapping[node] = graph.node_copy(node, lambda source: mapping[source])
    graph.output(tuple(mapping[node] for node in segment.results))
    return GraphModule(body, graph)


def _dense_fake(node: Node) -> Tensor:
    value = fake_of(node)
    spec = TensorSpec.of(value)
    order = dense_order(spec)
    with value.fake_mode:  # type: ignore[attr-defined]
        inner = torch.empty([spec.shape[dim] for dim in order], dtype=spec.dtype, device=spec.device)
        return inner.permute([order.index(dim) for dim in range(len(order))])

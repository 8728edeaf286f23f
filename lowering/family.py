"""A graph with symbolic sizes as a family: every set of sizes that is asked for is a static program.

The family keeps the operations of the symbolic graph and none of its symbols. A request's sizes are put in,
shapes are computed again under fake tensors, and what comes out is the graph that ``dynamic=False`` would
have given, so that it shares a program, a plan and bundles with every other request of those sizes.
"""

from __future__ import annotations

import itertools
import operator
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from torch_mux import compat
from torch_mux.types import FallbackKind, FallbackReason, TensorSpec

from .capture import capture, mutated_by
from .graphs import placeholders
from .program import Program

__all__ = ["MOST_SIZES", "Family", "Unspecialisable"]

#: Sets of sizes of one family that get a program of their own.
MOST_SIZES = 64
_NUMBERS = (int, float, bool)
_families = itertools.count()


class Unspecialisable(Exception):
    """Concrete sizes do not make the graph static; the message says why."""


@dataclass(frozen=True)
class _Member:
    program: Program
    tensors: tuple[int, ...] | None


class Family:
    """The programs of one symbolic graph, by sizes.

    Args:
        module: AOTAutograd's functional ATen graph with symbolic sizes; copied, not kept.
        static_positions: positions of parameters and buffers among its arguments.
        name: what to call its programs in reports.

    Raises:
        Unspecialisable: the graph's shapes depend on data, so that no sizes make it static.
    """

    def __init__(self, module: GraphModule, static_positions: Sequence[int], name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._members: dict[tuple[object, ...], _Member] = {}
        self._general: _Member | None = None
        arguments = placeholders(module.graph)
        static = set(static_positions)
        self._parameters = tuple(
            position
            for position, node in enumerate(arguments)
            if position in static and isinstance(node.meta.get("val"), Tensor)
        )
        self._inputs = tuple(p for p in range(len(arguments)) if p not in set(self._parameters))
        self._sized = tuple(
            p for p, node in enumerate(arguments) if compat.is_symbolic([node.meta.get("val")])
        )
        self._graph = _without_values(module)
        specialise(self._graph, [compat.hinted(node.meta.get("val")) for node in arguments])

    def member(self, arguments: Sequence[Any]) -> tuple[Program, list[object]]:
        """The program for the sizes of a flat argument list, and the program's own arguments among them.

        Beyond ``MOST_SIZES`` sets of sizes the rest share one program that runs per instance, operation by
        operation, and says so.
        """
        key = tuple(map(_size, map(arguments.__getitem__, self._sized)))
        member = self._members.get(key)
        if member is None:
            with self._lock:
                member = self._members.get(key) or self._new(key, arguments)
        if member.tensors is None:
            return member.program, list(arguments)
        return member.program, [arguments[position] for position in member.tensors]

    def _new(self, key: tuple[object, ...], arguments: Sequence[Any]) -> _Member:
        if len(self._members) >= MOST_SIZES:
            if self._general is None:
                why = f"more than {MOST_SIZES} sets of sizes; the rest run operation by operation: "
                self._general = _Member(self._symbolic(arguments, why + "pad inputs to fewer sizes"), None)
            return self._general
        try:
            module = specialise(self._graph, arguments)
        except Unspecialisable as error:
            why = f"sizes that it cannot be specialised for run operation by operation: {error}"
            member = self._members[key] = _Member(self._symbolic(arguments, why), None)
            return member
        tensors = tuple(p for p, value in enumerate(arguments) if isinstance(value, Tensor))
        static = [place for place, position in enumerate(tensors) if position in self._parameters]
        member = self._members[key] = _Member(capture(module, static, self._name), tensors)
        return member

    def _symbolic(self, arguments: Sequence[Any], why: str) -> Program:
        """The program that runs the symbolic graph as it is, an instance at a time."""
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        graph = self._graph

        def run(flat: list[Any]) -> Any:
            return graph(*flat)

        return Program(
            fingerprint=f"family-{next(_families)}",
            name=self._name,
            device=next((x.device for x in tensors if x.device.type != "cpu"), torch.device("cpu")),
            inputs=(None,) * len(self._inputs),
            parameters=tuple(TensorSpec.of(arguments[position]) for position in self._parameters),
            outputs=(),
            input_positions=self._inputs,
            parameter_positions=self._parameters,
            mutates=mutated_by(graph) is not None,
            fallback=FallbackReason(FallbackKind.DYNAMIC_SHAPE, self._name, why),
            graph=graph,
            artifact=run,
        )


def _size(value: Any) -> object:
    return (tuple(value.shape), value.stride()) if isinstance(value, Tensor) else value


def _without_values(module: GraphModule) -> GraphModule:
    """The operations alone: fake tensors and symbols would keep the tracing alive."""
    graph = Graph()
    mapping: dict[Node, Node] = {}
    for node in module.graph.nodes:
        mapping[node] = graph.node_copy(node, lambda source: mapping[source])
        mapping[node].meta = {}
    return GraphModule(module, graph)


def specialise(module: GraphModule, arguments: Sequence[Any]) -> GraphModule:
    """``module`` for the sizes of ``arguments``: numbers become constants, tensors stay placeholders.

    Args:
        module: a symbolic ATen graph.
        arguments: its flat arguments; numbers, and real or fake tensors of static shape.

    Raises:
        Unspecialisable: a value depends on data, or a branch or loop has a graph of its own.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    graph, values = Graph(), dict[Node, Any]()
    with compat.plain_tracing(), mode:
        for node, argument in zip(placeholders(module.graph), arguments, strict=True):
            values[node] = _placeholder(graph, node, argument)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                continue
            try:
                values[node] = _specialised(module, graph, mode, node, values)
            except Exception as error:
                raise Unspecialisable(f"{node.target}: {str(error).split(chr(10))[0]}") from error
    return GraphModule(module, graph)


def _placeholder(graph: Graph, node: Node, argument: Any) -> Any:
    if not isinstance(argument, Tensor):
        return argument
    copy = graph.placeholder(node.name)
    copy.meta["val"] = torch.empty_strided(
        argument.shape, argument.stride(), dtype=argument.dtype, device=argument.device
    )
    return copy


def _specialised(
    module: GraphModule, graph: Graph, mode: FakeTensorMode, node: Node, values: dict[Node, Any]
) -> Any:
    """A number, or the node of the static graph that computes a tensor."""
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
    if node.op == "output":
        return graph.output(*args)
    if node.op == "get_attr":
        held = operator.attrgetter(str(node.target))(module)
        if not isinstance(held, Tensor):
            raise Unspecialisable("a branch or a loop with symbolic sizes")
        copy = graph.get_attr(str(node.target))
        copy.meta["val"] = mode.from_tensor(held)
        return copy
    fakes = torch.fx.map_arg((args, kwargs), lambda source: source.meta["val"])
    target: Any = node.target
    value = target(*fakes[0], **fakes[1])
    if value is None or isinstance(value, _NUMBERS):
        return value
    if compat.is_symbolic([value]):
        raise Unspecialisable("its shape depends on data")
    copy = graph.create_node(node.op, target, args, kwargs, node.name)
    copy.meta["val"] = value
    return copy

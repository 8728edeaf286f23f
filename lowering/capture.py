"""From AOTAutograd's inference graph to a :class:`Program`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from torch_mux.types import FallbackKind, FallbackReason, TensorSpec

from .fingerprint import fingerprint
from .graphs import (
    ROLE,
    call_nodes,
    dead_code,
    is_random,
    outputs_of,
    placeholders,
    restrides_only,
)
from .outputs import Derived, Unresolved, resolve_views
from .prepare import dependent
from .program import Program

__all__ = ["capture", "mutated_by"]


def _is_symbolic(module: GraphModule) -> bool:
    for node in module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) or (
            isinstance(value, Tensor)
            and any(isinstance(size, torch.SymInt) for size in (*value.shape, *value.stride()))
        ):
            return True
    return False


def _copied(module: GraphModule) -> GraphModule:
    """A copy whose fake tensors belong to a mode of its own, so that nothing of the tracing stays alive."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    known: dict[int, Tensor] = {}

    def moved(value: Any) -> Any:
        if isinstance(value, FakeTensor):
            if id(value) not in known:
                with mode:
                    known[id(value)] = torch.empty_strided(
                        tuple(int(size) for size in value.shape),
                        tuple(int(stride) for stride in value.stride()),
                        dtype=value.dtype,
                        device=value.device,
                    )
            return known[id(value)]
        if isinstance(value, (tuple, list)):
            return type(value)(moved(item) for item in value)
        return value

    graph = Graph()
    mapping: dict[Node, Node] = {}
    for node in module.graph.nodes:
        copy = graph.node_copy(node, lambda source: mapping[source])
        copy.meta = {key: node.meta[key] for key in (ROLE,) if key in node.meta}
        if "val" in node.meta:
            copy.meta["val"] = moved(node.meta["val"])
        mapping[node] = copy
    return GraphModule(module, graph)


def mutated_by(module: GraphModule) -> str | None:
    """The operation by which a graph writes one of its arguments, or None."""
    for node in call_nodes(module.graph):
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            return str(node.target)
    return None


def _fallback(module: GraphModule) -> FallbackReason | None:
    written = mutated_by(module)
    if written is not None:
        return FallbackReason(FallbackKind.MUTATES_INPUT, written)
    for node in call_nodes(module.graph):
        if node.target is torch.ops.aten.as_strided.default and not restrides_only(node):
            # it reads memory, whose order a plan chooses
            return FallbackReason(FallbackKind.SUBCLASS, str(node.target), "it depends on strides")
    if not any(
        node.meta.get(ROLE) == "input" and isinstance(node.meta["val"], Tensor) for node in module.graph.nodes
    ):
        return FallbackReason(FallbackKind.NO_RULE, "graph", "it has no tensor inputs")
    devices = _devices(module.graph)
    if len(devices) > 1:
        return FallbackReason(FallbackKind.SUBCLASS, "graph", f"spans {sorted(map(str, devices))}")
    return None


def _devices(graph: Graph) -> set[torch.device]:
    """Where the tensors of a request are; not where constants are made that end in *prepare*.

    Models make positions on the CPU and move them, such as the distances of a relative position bias.
    """
    prepared = dependent(graph)
    made: set[Node] = set()  # of constants alone
    for node in graph.nodes:
        constant = node.op in ("call_function", "get_attr") and not is_random(node)
        if constant and made.issuperset(node.all_input_nodes):
            made.add(node)
    ending: set[Node] = set()
    for node in reversed(list(graph.nodes)):
        if node in made and all(user in prepared or user in ending for user in node.users):
            ending.add(node)
    return {
        value.device
        for node in graph.nodes
        if node not in ending and isinstance(value := node.meta.get("val"), Tensor) and value.dim() > 0
    }


def _writable(spec: TensorSpec | None) -> TensorSpec | None:
    """``spec``, or a dense one where several elements of an expanded output would share memory."""
    if spec is None or all(
        stride or size == 1 for size, stride in zip(spec.shape, spec.strides, strict=True)
    ):
        return spec
    strides = torch.empty(spec.shape, device="meta").stride()
    return dataclasses.replace(spec, strides=tuple(strides))


def capture(module: GraphModule, static_positions: Sequence[int], name: str) -> Program:
    """The program of an inference graph.

    Args:
        module: AOTAutograd's functional ATen graph, with ``meta["val"]`` on every node; copied, not kept.
        static_positions: positions of parameters and buffers among the graph's arguments.
        name: what to call it in reports.

    Raises:
        ValueError: the graph has symbolic shapes; these have no static program.
    """
    if _is_symbolic(module):
        raise ValueError("a graph with symbolic shapes has no static program")
    static = set(static_positions)
    for position, node in enumerate(placeholders(module.graph)):
        tensor = isinstance(node.meta.get("val"), Tensor)
        node.meta[ROLE] = "parameter" if position in static and tensor else "input"
    module = _copied(module)
    dead_code(module.graph)
    module.recompile()
    arguments = placeholders(module.graph)

    def spec(value: Any) -> TensorSpec | None:
        value = value.meta.get("val") if isinstance(value, Node) else value
        return TensorSpec.of(value) if isinstance(value, Tensor) else None

    identity, fallback = fingerprint(module), _fallback(module)
    derived: tuple[Derived | None, ...] = ()
    hidden = 0
    if fallback is None:
        try:
            derived, hidden = resolve_views(module)
        except Unresolved as unresolved:
            fallback = FallbackReason(FallbackKind.ALIASED_OUTPUT, str(unresolved))
    returned = outputs_of(module.graph)
    inputs = tuple(i for i, node in enumerate(arguments) if node.meta[ROLE] == "input")
    parameters = tuple(i for i, node in enumerate(arguments) if node.meta[ROLE] == "parameter")
    specs = [spec(node) for node in arguments]
    tensors = [item for item in specs if item is not None]
    device = next((item.device for item in tensors if item.device.type != "cpu"), torch.device("cpu"))
    return Program(
        fingerprint=identity,
        name=name,
        device=device,
        inputs=tuple(specs[i] for i in inputs),
        parameters=tuple(item for i in parameters if (item := specs[i]) is not None),
        outputs=tuple(_writable(spec(value)) for value in returned),
        input_positions=inputs,
        parameter_positions=parameters,
        mutates=mutated_by(module) is not None,
        fallback=fallback,
        graph=module,
        derived=derived,
        hidden=hidden,
        literals={i: v for i, v in enumerate(returned) if v is not None and not isinstance(v, Node)},
    )

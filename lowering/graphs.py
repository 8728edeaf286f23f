"""Small helpers over ``torch.fx`` graphs whose nodes carry ``meta["val"]``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves

__all__ = [
    "call_nodes",
    "dead_code",
    "emit",
    "fake_of",
    "fresh_meta",
    "hoist",
    "is_random",
    "outputs_of",
    "parameter_only",
    "placeholders",
    "restrides_only",
    "shape_of",
    "tensors_in",
]

#: ``placeholder.meta[ROLE]`` is "parameter" or "input".
ROLE = "mux_role"


def fake_of(node: Node) -> Tensor:
    """The fake tensor that stands for ``node``'s value."""
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        raise TypeError(f"{node.format_node()} does not produce one tensor")
    return value


def shape_of(node: Node) -> tuple[int, ...]:
    """The static shape of ``node``'s value."""
    return tuple(int(size) for size in fake_of(node).shape)


def placeholders(graph: Graph) -> list[Node]:
    """The graph's inputs in order."""
    return [node for node in graph.nodes if node.op == "placeholder"]


def call_nodes(graph: Graph) -> list[Node]:
    """The graph's ``call_function`` nodes in order."""
    return [node for node in graph.nodes if node.op == "call_function"]


def outputs_of(graph: Graph) -> list[Any]:
    """The flat output arguments of the graph."""
    output = next(node for node in graph.nodes if node.op == "output")
    value = output.args[0]
    return list(value) if isinstance(value, (tuple, list)) else [value]


def tensors_in(args: Iterable[Any]) -> Iterator[Node]:
    """Every node inside nested arguments."""
    found: list[Node] = []
    torch.fx.map_arg(tuple(args), found.append)
    yield from found


def _fake_value(value: Any) -> Any:
    return value.meta["val"] if isinstance(value, Node) else value


def emit(
    graph: Graph, target: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> Node:
    """Adds a call at the graph's insertion point and computes its ``meta["val"]``."""
    kwargs = dict(kwargs or {})
    fake_args = torch.fx.map_arg(args, _fake_value)
    fake_kwargs = torch.fx.map_arg(kwargs, _fake_value)
    values = [node.meta["val"] for node in tensors_in((args, tuple(kwargs.values())))]
    mode = next(each.fake_mode for each in tree_leaves(values) if isinstance(each, FakeTensor))
    node = graph.call_function(target, args, kwargs)
    with mode, torch.no_grad():
        node.meta["val"] = target(*fake_args, **fake_kwargs)
    return node


def fresh_meta(module: GraphModule) -> GraphModule:
    """Recompiles ``module`` after an edit and removes what nothing uses."""
    dead_code(module.graph)
    module.graph.lint()
    module.recompile()
    return module


def dead_code(graph: Graph) -> None:
    """Removes pure nodes without users, random ones too; placeholders stay."""
    for node in reversed(list(graph.nodes)):
        if node.op not in ("call_function", "get_attr") or node.users:
            continue
        if is_random(node) or not node.is_impure():
            graph.erase_node(node)


def restrides_only(node: Node) -> bool:
    """Whether an ``as_strided`` reads its operand's own elements and renames strides that no step follows.

    ATen's global pooling does so, for a result that counts as channels-last.
    """
    if node.target is not torch.ops.aten.as_strided.default or len(node.args) > 3 or node.kwargs:
        return False
    source, shape, strides = node.args
    if not isinstance(source, Node) or not isinstance(shape, (list, tuple)):
        return False
    value = fake_of(source)
    return tuple(shape) == tuple(value.shape) and all(
        size == 1 or own == given
        for size, own, given in zip(shape, value.stride(), strides, strict=True)  # type: ignore[arg-type]
    )


def is_random(node: Node) -> bool:
    """Whether ``node`` may draw random numbers."""
    return (
        isinstance(node.target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in node.target.tags
    )


def parameter_only(graph: Graph) -> set[Node]:
    """Nodes whose value depends on parameters and constants only, parameters included."""
    found: set[Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if node.meta.get(ROLE) == "parameter":
                found.add(node)
        elif node.op == "get_attr":
            found.add(node)
        elif node.op == "call_function":
            sources = list(tensors_in((node.args, tuple(node.kwargs.values()))))
            if not is_random(node) and all(source in found for source in sources):
                found.add(node)
    return found


def hoist(graph: Graph, operands: Sequence[Node], weights: set[Node], first: Node) -> None:
    """Moves what ``operands`` are computed from, parameters only, before ``first``."""
    needed, pending = set[Node](), list(operands)
    while pending:
        current = pending.pop()
        if current not in needed and current in weights and current.op != "placeholder":
            needed.add(current)
            pending.extend(current.all_input_nodes)
    later = False
    for node in list(graph.nodes):
        later = later or node is first
        if later and node in needed:
            first.prepend(node)

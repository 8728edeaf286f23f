"""Programs on disk: a later process that Dynamo hands the same graph skips AOTAutograd and capture.

Only for graphs of which all that decides about the program is known: functions of PyTorch itself on plain
tensors of fixed sizes, with constants for arguments. They are named by that and by everything around it, so
that a graph, a version or a setting that is another one finds nothing.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import operator
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from torch_mux import compat
from torch_mux.types import TensorSpec

from . import kept
from .graphs import ROLE
from .kept_plans import operator_of
from .program import Program

__all__ = ["load", "name_of", "save"]

log = logging.getLogger(__name__)

_FOLDER: Final = "programs"
_CONSTANTS: Final = (
    int,
    float,
    complex,
    bool,
    str,
    type(None),
    type(...),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)


class _Unknown(Exception):
    """Something about a graph is not known well enough."""


def name_of(graph: GraphModule, inputs: Sequence[object]) -> str | None:
    """The name of what a graph of Dynamo's becomes: a digest of all that decides about it, or None.

    Args:
        graph: functions of PyTorch that Dynamo recorded.
        inputs: what it was recorded with, in order.
    """
    try:
        state = compat.graph_state()
        if state is None:
            raise _Unknown("a mode or autocast is on")
        if next(graph.parameters(), None) is not None or next(graph.buffers(), None) is not None:
            raise _Unknown("it holds tensors itself")
        devices = sorted({x.device for x in inputs if isinstance(x, Tensor)}, key=str)
        models = list(map(kept.model_of, devices))
        return kept.digest_of("program", _text(graph.graph), _facts(graph.graph, inputs), models, state)
    except _Unknown as reason:
        log.debug("a graph is captured anew in every process: %s", reason)
    except Exception:  # what it costs is time
        log.warning("a graph could not be named and is captured anew", exc_info=True)
    return None


def _facts(graph: Graph, inputs: Sequence[object]) -> list[object]:
    """All inputs, and which of them share memory."""
    nodes = [node for node in graph.nodes if node.op == "placeholder"]
    if len(nodes) != len(inputs) or len(set(map(id, inputs))) != len(inputs):
        raise _Unknown("its inputs are not those of its placeholders")
    found: list[object] = []
    memory: dict[int, int] = {}
    for node, value in zip(nodes, inputs, strict=True):
        facts = compat.input_facts(node, value)
        if facts is None:
            raise _Unknown(f"{node} is no plain tensor")
        assert isinstance(value, Tensor)
        found.append((facts, memory.setdefault(value.untyped_storage()._cdata, len(memory))))
    return found


def _text(graph: Graph) -> str:
    """Every operation with its arguments; nodes by their numbers."""
    numbers: dict[Node, int] = {}
    lines: list[str] = []
    for node in graph.nodes:
        if node.op == "call_function":
            target = _function(node.target)
        elif node.op == "call_method" or node.op in ("placeholder", "output"):
            target = "" if node.op == "placeholder" else str(node.target)
        else:
            raise _Unknown(f"{node.op} of {node.target}")
        arguments = "" if node.op == "placeholder" else _argument((node.args, node.kwargs), numbers)
        numbers[node] = len(numbers)
        lines.append(f"{node.op} {target} {arguments}")
    return "\n".join(lines)


def _function(target: Any) -> str:
    """Where a function of PyTorch or of Python's operators is to be found."""
    name = compat.public_name(target)
    if name is None:
        raise _Unknown(f"it calls {target}")
    return name


def _argument(value: Any, numbers: dict[Node, int]) -> str:
    if isinstance(value, Node):
        return f"%{numbers[value]}"
    if isinstance(value, (tuple, list)):  # torch.fx has classes of its own for lists; torch.Size is a tuple
        kind = "l" if isinstance(value, list) else "t"
        return f"{kind}({','.join(_argument(item, numbers) for item in value)})"
    if isinstance(value, dict):
        pairs = [f"{_argument(key, numbers)}:{_argument(item, numbers)}" for key, item in value.items()]
        return f"d({','.join(pairs)})"
    if isinstance(value, slice):
        return f"s{_argument((value.start, value.stop, value.step), numbers)}"
    if type(value) not in _CONSTANTS:
        raise _Unknown(f"an argument is a {type(value).__name__}")
    return f"{type(value).__name__}:{value!r}"


@dataclass(frozen=True)
class _Place:
    """A node among the arguments of another."""

    number: int


@dataclass(frozen=True)
class _Operation:
    """A node as data.

    Attributes:
        meta: roles and values, tensors as their specs.
    """

    op: str
    name: str
    target: Any
    args: Any
    kwargs: Any
    meta: dict[str, Any]


class _Pickler(pickle.Pickler):
    """Names operators, which do not pickle."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch._ops.OpOverload):
            return operator_of, (value._schema.name, value._overloadname)
        return NotImplemented


def save(name: str, program: Program) -> None:
    """Keeps the program being captured under that name, if a call of its graph is all that a call is."""
    if program.fallback is not None or program.mutates or any(program.derived) or program.hidden:
        return
    try:
        if not compat.only_passes_on(len(program.inputs) + len(program.parameters)):
            return
        bare = {
            field.name: getattr(program, field.name)
            for field in dataclasses.fields(program)
            if field.name not in ("name", "graph", "artifact")
        }
        buffer = io.BytesIO()
        _Pickler(buffer, protocol=5).dump((bare, _operations(program.graph.graph)))
        kept.write(_FOLDER, name, buffer.getvalue())
    except Exception as error:  # a full disk, a folder of somebody else, a value that does not pickle
        log.info("the program was not kept on disk: %s", repr(error))


def load(name: str, called: str) -> Program | None:
    """The program of that name on disk, to be called ``called`` in reports, or None."""
    try:
        payload = kept.read(_FOLDER, name)
        if payload is None:
            return None
        bare, operations = pickle.loads(payload)
        return Program(**bare, name=called, graph=_module(operations))
    except kept.Damaged:
        log.info("a program on disk is damaged and is captured again")
    except Exception as error:  # written by sources that this process knows nothing of
        log.info("a program on disk cannot be read and is captured again: %s", repr(error))
    return None


def _operations(graph: Graph) -> list[_Operation]:
    places = {node: _Place(number) for number, node in enumerate(graph.nodes)}
    found = []
    for node in graph.nodes:
        if node.op == "get_attr" or (
            node.op == "call_function"
            and not isinstance(node.target, torch._ops.OpOverload)
            and node.target is not operator.getitem
        ):
            raise _Unknown(f"{node.op} of {node.target}")
        found.append(
            _Operation(
                node.op,
                node.name,
                node.target,
                _plain(node.args, places),
                _plain(node.kwargs, places),
                {key: _plain(node.meta[key], places) for key in (ROLE, "val") if key in node.meta},
            )
        )
    return found


def _plain(value: Any, places: dict[Node, _Place]) -> Any:
    if isinstance(value, Node):
        return places[value]
    if isinstance(value, Tensor):
        return TensorSpec.of(value)
    if isinstance(value, (tuple, list)):
        return (list if isinstance(value, list) else tuple)(_plain(item, places) for item in value)
    if isinstance(value, dict):
        return {key: _plain(item, places) for key, item in value.items()}
    if type(value) not in _CONSTANTS:
        raise _Unknown(f"a {type(value).__name__}")
    return value


def _module(operations: Sequence[_Operation]) -> GraphModule:
    graph = Graph()
    nodes: list[Node] = []

    def made(value: Any) -> Any:
        if isinstance(value, _Place):
            return nodes[value.number]
        if isinstance(value, (tuple, list)):
            return type(value)(made(item) for item in value)
        if isinstance(value, dict):
            return {key: made(item) for key, item in value.items()}
        return value

    with FakeTensorMode(allow_non_fake_inputs=True):  # as capture's
        for one in operations:
            node = graph.create_node(one.op, one.target, made(one.args), made(one.kwargs), name=one.name)
            node.meta.update((key, _fake(value)) for key, value in one.meta.items())
            nodes.append(node)
    return GraphModule(torch.nn.Module(), graph)


def _fake(value: Any) -> Any:
    if isinstance(value, TensorSpec):
        return torch.empty_strided(value.shape, value.strides, dtype=value.dtype, device=value.device)
    if isinstance(value, (tuple, list)):
        return type(value)(map(_fake, value))
    return value

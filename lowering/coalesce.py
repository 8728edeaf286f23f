"""The slot axis: the body of one slot, walked with a leading symbolic dimension T on every value."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from torch_mux import compat
from torch_mux.types import FallbackKind, FallbackReason, TensorSpec

from .graphs import ROLE, call_nodes, is_random, outputs_of, placeholders, tensors_in
from .ops.block import BLOCK
from .ops.semantic import CONVOLUTION, LINEAR, LINEARS
from .prepare import INDEX, Prepare
from .rules import Context, NoRule, Parameter, Slotted, rule_for
from .storage import ALIGNMENT, Field, Layout

__all__ = ["SlotSpace", "dense_order", "evaluate", "lay_out", "mark"]

aten = torch.ops.aten

#: Operation → position of the operand, or of several, that is read through the pointer table.
_POINTED: dict[Any, int] = {LINEAR: 1, LINEARS: 1, CONVOLUTION: 1, BLOCK: 1, aten.embedding.default: 0}
#: Elements of an arena row start on whole cache lines.
_LINE = 128
_SLOTS_HINT, _CAPACITY_HINT = 16, 64
#: Most slots of a bundle and most rows of the tables; 32-bit indices may allow fewer.
MOST_SLOTS, MOST_ROWS = 4096, 1 << 20
#: An operation that allows fewer slots than this runs per instance.
_FEWEST_SLOTS = 64


def lay_out(body: GraphModule, prepare: Prepare, nodes: Sequence[Node]) -> Layout:
    """Pointer columns and arena fields for the prepared values that ``nodes`` read or the body returns."""
    reading, returned = set(nodes), set(tensors_in(outputs_of(body.graph)))
    columns: list[int] = []
    fields: dict[int, Field] = {}
    widths: dict[torch.dtype, int] = {}
    for value in placeholders(body.graph):
        if value.meta[ROLE] != "value":
            continue
        index, users = value.meta[INDEX], [user for user in value.users if user in reading]
        pointed = {user: _pointed(user).count(value) for user in users}
        if any(pointed.values()):
            columns.append(index)
        if value in returned or any(list(_operands(user)).count(value) > pointed[user] for user in users):
            spec = prepare.specs[index]
            step = max(1, ALIGNMENT // spec.dtype.itemsize)
            offset = -(-widths.get(spec.dtype, 0) // step) * step
            fields[index] = Field(spec.dtype, offset, spec.numel)
            widths[spec.dtype] = offset + spec.numel
    whole = {
        dtype: -(-width * dtype.itemsize // _LINE) * _LINE // dtype.itemsize
        for dtype, width in widths.items()
    }
    return Layout(tuple(columns), fields, whole)


def _pointed(node: Node) -> list[Node]:
    """The operands that ``node`` reads through the pointer table."""
    position = _POINTED.get(node.target)
    return [] if position is None else list(tensors_in((node.args[position],)))


def _operands(node: Node) -> list[Node]:
    return list(tensors_in((node.args, tuple(node.kwargs.values()))))


def dense_order(spec: TensorSpec) -> tuple[int, ...]:
    """The dimensions of ``spec`` from the outermost in memory inwards; plain order if it is not dense."""
    order = sorted(range(len(spec.shape)), key=lambda dim: (-spec.strides[dim], dim))
    expected = 1
    for dim in reversed(order):
        if spec.shape[dim] != 1 and spec.strides[dim] != expected:
            return tuple(range(len(spec.shape)))
        expected *= spec.shape[dim]
    return tuple(order)


@dataclass(frozen=True)
class SlotSpace:
    """Fake tables and a symbolic slot count for one trace.

    Attributes:
        shapes: the symbolic world; see :func:`torch_mux.compat.symbolic_world`.
        arguments: fakes of rows, control, table and the arenas, in the order of :attr:`dtypes`.
    """

    shapes: compat.SymbolicWorld
    slots: Any
    capacity: Any
    arguments: tuple[Tensor, ...]
    dtypes: tuple[torch.dtype, ...]

    def limits(self) -> tuple[int, int]:
        """The most (slots, rows) that everything traced so far is right for."""
        return self.shapes.limit(self.slots, MOST_SLOTS), self.shapes.limit(self.capacity, MOST_ROWS)

    @classmethod
    def create(cls, device: torch.device, layout: Layout) -> SlotSpace:
        """A new symbolic world whose slot count and capacity are free symbols."""
        shapes = compat.symbolic_world()
        slots = shapes.symbol("slots", _SLOTS_HINT)
        capacity = shapes.symbol("capacity", _CAPACITY_HINT)
        dtypes = tuple(layout.widths)
        with shapes.mode:
            arguments = (
                torch.empty((slots,), dtype=torch.int64, device=device),
                torch.empty((2,), dtype=torch.int32, device=device),
                torch.empty((capacity, max(1, len(layout.columns))), dtype=torch.int64, device=device),
                *(torch.empty((capacity, layout.widths[d]), dtype=d, device=device) for d in dtypes),
            )
        return cls(shapes, slots, capacity, arguments, dtypes)

    def stacked(self, spec: TensorSpec) -> Tensor:
        """A fake [T, *shape] whose slots are dense in the memory order of ``spec``."""
        order = dense_order(spec)
        with self.shapes.mode:
            dense = torch.empty(
                (self.slots, *(spec.shape[dim] for dim in order)), dtype=spec.dtype, device=spec.device
            )
            return dense.permute(0, *(order.index(dim) + 1 for dim in range(len(order))))

    def context(
        self, tables: Sequence[Tensor], layout: Layout, key: str, allow_tf32: tuple[bool, bool]
    ) -> Context:
        """The rules' context over ``tables`` (this space's arguments or what a tracer made of them)."""
        rows, control, table, *arenas = tables
        return Context(
            slots=rows.shape[0],
            rows=rows,
            control=control,
            table=table,
            arenas=dict(zip(self.dtypes, arenas, strict=True)),
            columns={index: column for column, index in enumerate(layout.columns)},
            fields=layout.fields,
            key=key,
            allow_tf32=allow_tf32,
        )


def parameter_of(node: Node) -> Parameter:
    """The unread prepared value behind a body's "value" placeholder."""
    value: Tensor = node.meta["val"]
    shape, strides = tuple(int(s) for s in value.shape), tuple(int(s) for s in value.stride())
    return Parameter(node.meta[INDEX], shape, strides, value.dtype)


def _resolve(argument: Any, values: Mapping[Node, Any]) -> Any:
    if isinstance(argument, Node):
        return values[argument]
    if isinstance(argument, (tuple, list)):
        return type(argument)(_resolve(item, values) for item in argument)
    return argument


def _slotted(argument: Any) -> bool:
    if isinstance(argument, (tuple, list)):
        return any(_slotted(item) for item in argument)
    return isinstance(argument, (Slotted, Parameter))


def _checked(node: Node, result: Any) -> Any:
    """``result`` in the dtype that one slot has: a slot axis makes a 0-d parameter promote differently."""
    expected = node.meta.get("val")
    if isinstance(result, Slotted) and isinstance(expected, Tensor) and result.tensor.dtype != expected.dtype:
        return Slotted(result.tensor.to(expected.dtype))
    return result


def evaluate(context: Context, module: GraphModule, node: Node, values: Mapping[Node, Any]) -> Any:
    """The value of one body operation with the slot axis; constants stay without one.

    Raises:
        NoRule: the operation cannot take the slot axis.
    """
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(module)
    args, kwargs = (
        _resolve(node.args, values),
        {key: _resolve(value, values) for key, value in node.kwargs.items()},
    )
    target: Any = node.target
    if target is operator.getitem:
        if args[0][args[1]] is None:
            raise NoRule(f"result {args[1]} of {node.args[0]}")
        return args[0][args[1]]
    if not _slotted((args, tuple(kwargs.values()))):
        if is_random(node):
            raise NoRule(str(target))
        return target(*args, **kwargs)
    return _checked(node, rule_for(target)(context, node, args, kwargs))


def mark(
    body: GraphModule, prepare: Prepare, device: torch.device, allow_tf32: tuple[bool, bool]
) -> dict[Node, FallbackReason]:
    """The operations that must run per instance, each with its reason.

    Every rule is tried on fake tensors; one that raises, or needs to know the slot count, is a fall-back.
    """
    nodes = [node for node in body.graph.nodes if node.op in ("call_function", "get_attr")]
    layout = lay_out(body, prepare, nodes)
    space, context, values = _renewed(body, device, layout, allow_tf32, {})
    reasons: dict[Node, FallbackReason] = {}
    for node in nodes:
        try:
            with space.shapes.tracing():
                values[node] = evaluate(context, body, node, values)
            if min(space.limits()) < _FEWEST_SLOTS:
                raise NoRule(f"it needs to know the slot count: {space.shapes.knowledge()}")
        except Exception as error:  # any failure of a rule is that operation's reason, never the program's
            kind = FallbackKind.RANDOM if is_random(node) else FallbackKind.NO_RULE
            name, detail = str(node.target), str(error).split("\n")[0]
            reasons[node] = FallbackReason(kind, name, "" if detail == name else detail)
            if min(space.limits()) < _FEWEST_SLOTS:
                space, context, values = _renewed(body, device, layout, allow_tf32, values)
            values[node] = _stand_in(space, node)
    for node in call_nodes(body.graph):
        if node.target is operator.getitem and node.args[0] in reasons:
            reasons.setdefault(node, reasons[node.args[0]])  # type: ignore[index]
    return reasons


def _renewed(
    body: GraphModule,
    device: torch.device,
    layout: Layout,
    allow_tf32: tuple[bool, bool],
    known: Mapping[Node, Any],
) -> tuple[SlotSpace, Context, dict[Node, Any]]:
    """A fresh world with the body's inputs and stand-ins for the operations already ``known``."""
    space = SlotSpace.create(device, layout)
    values: dict[Node, Any] = {}
    for node in placeholders(body.graph):
        values[node] = parameter_of(node) if node.meta[ROLE] == "value" else _stand_in(space, node)
    for node, value in known.items():
        if node.op != "placeholder":
            values[node] = _stand_in(space, node) if _slotted(value) else value
    return space, space.context(space.arguments, layout, "", allow_tf32), values


def _stand_in(space: SlotSpace, node: Node) -> Any:
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return tuple(Slotted(space.stacked(TensorSpec.of(v))) if isinstance(v, Tensor) else v for v in value)
    return Slotted(space.stacked(TensorSpec.of(value))) if isinstance(value, Tensor) else value

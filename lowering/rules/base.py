"""Values with a slot axis, the context that rules run in, and the registry of rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..storage import Field

__all__ = ["Context", "NoRule", "Parameter", "Rule", "Slotted", "rule", "rule_for", "shape_of_slot"]


class NoRule(Exception):
    """An operation cannot take the slot axis; the message says why."""


@dataclass(frozen=True)
class Slotted:
    """A tensor with the slot axis: [T, *shape of one slot]."""

    tensor: Tensor


@dataclass(frozen=True)
class Parameter:
    """A prepared value, not yet read: a pointer column or an arena field.

    Attributes:
        index: which prepared value.
        shape, strides: those of one instance's tensor.
    """

    index: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Context:
    """What the rules of one trace share.

    Attributes:
        slots: the symbolic slot count T.
        rows: int64 [T], the table row of each slot.
        control: int32 [2], (active slots, cap in SMs).
        table: int64 [capacity, P], weight addresses.
        arenas: [capacity, W] a dtype.
        columns: pointer column by prepared value.
        fields: arena place by prepared value.
        key: the storage's key, for the CPU.
        allow_tf32: (GEMM, convolution) precision that torch's settings allow for float32.
    """

    slots: Any
    rows: Tensor
    control: Tensor
    table: Tensor
    arenas: dict[torch.dtype, Tensor]
    columns: dict[int, int]
    fields: dict[int, Field]
    key: str
    allow_tf32: tuple[bool, bool]

    def lift(self, value: Any, shape: Sequence[int] | None = None) -> Tensor:
        """``value`` as [T, *shape]; unslotted tensors are repeated for each slot.

        Raises:
            NoRule: ``value`` is no tensor.
        """
        if isinstance(value, Slotted):
            return value.tensor
        if isinstance(value, Parameter):
            return self.read(value)
        if isinstance(value, Tensor):
            return value.unsqueeze(0).expand(self.slots, *value.shape)
        raise NoRule(f"{type(value).__name__} where a tensor is needed")

    def read(self, value: Parameter) -> Tensor:
        """A small parameter of every slot, [T, *shape], indexed from its arena."""
        place = self.fields[value.index]
        arena = self.arenas[place.dtype]
        chosen: Tensor = torch.ops.aten.index.Tensor(
            arena[:, place.offset : place.offset + place.numel], [self.rows]
        )
        return chosen.view(self.slots, *value.shape)

    def aligned(self, value: Any, rank: int) -> Any:
        """``value`` ready to broadcast against slots of ``rank`` dimensions: 1s go behind the slot axis."""
        if isinstance(value, (Slotted, Parameter)):
            tensor = self.lift(value)
            missing = rank - (tensor.dim() - 1)
            return tensor.view(self.slots, *([1] * missing), *tensor.shape[1:]) if missing > 0 else tensor
        return value

    def fold(self, value: Any, batch: int | None = None) -> Tensor:
        """[T, B, …] as [T·B, …]; a broadcast batch is expanded to ``batch`` first."""
        tensor = self.lift(value)
        if batch is not None and tensor.shape[1] != batch:
            tensor = tensor.expand(tensor.shape[0], batch, *tensor.shape[2:])
        return tensor.reshape(tensor.shape[0] * tensor.shape[1], *tensor.shape[2:])

    def unfold(self, tensor: Tensor) -> Slotted:
        """The reverse of :meth:`fold`; the batch size is inferred."""
        return Slotted(tensor.reshape(self.slots, -1, *tensor.shape[1:]))


Rule = Callable[[Context, Node, "tuple[Any, ...]", "dict[str, Any]"], Any]
_rules: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Registers the decorated function as the rule of ``targets``."""

    def register(function: Rule) -> Rule:
        for target in targets:
            _rules[target] = function
        return function

    return register


def rule_for(target: Any) -> Rule:
    """The rule of ``target``.

    Raises:
        NoRule: there is none.
    """
    found = _rules.get(target)
    if found is not None:
        return found
    tags = target.tags if isinstance(target, torch._ops.OpOverload) else ()
    if torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags:
        return _rules[torch.Tag.pointwise]
    raise NoRule(str(target))


def shape_of_slot(node: Node) -> tuple[int, ...]:
    """The static shape of one slot of ``node``'s value."""
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        raise NoRule(f"{node.target} has several results")
    return tuple(int(size) for size in value.shape)

"""Which super-kernels a coalesced segment launches at a bundle size, found without running it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from sympy import Basic
from torch import Tensor
from torch.fx import GraphModule, Node

from torch_mux import compat

from .coalesce import SlotSpace
from .graphs import call_nodes
from .kernels import ahead
from .kernels.code import Code
from .kernels.interception import recording

if TYPE_CHECKING:
    from .kernels.common import Launch

__all__ = ["KernelCalls"]

log = logging.getLogger(__name__)

#: Rows of the tables that stand in for the real ones: no kernel is compiled for their number.
_ROWS: Final = 32


@dataclass(frozen=True)
class _Like:
    """A tensor argument whose sizes may depend on the slot count."""

    shape: tuple[Any, ...]
    strides: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device

    def make(self, sizes: Mapping[Any, int]) -> Tensor:
        """The tensor for these numbers in place of the symbols."""
        shape, strides = (
            tuple(_number(value, sizes) for value in values) for values in (self.shape, self.strides)
        )
        return torch.empty_strided(shape, strides, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class KernelCalls:
    """The calls of operators with kernels of their own in a batched graph, each distinct one once.

    Attributes:
        calls: (operator, its arguments); tensors as what they are like.
        slots, rows: the symbols of the slot count and of the rows of the tables.
    """

    calls: tuple[tuple[Any, tuple[Any, ...]], ...]
    slots: Any
    rows: Any

    @classmethod
    def of(cls, graph: GraphModule, space: SlotSpace, namespace: str = "mux") -> KernelCalls:
        """The calls of a traced segment; to be taken before Inductor edits ``graph``."""
        found: dict[tuple[Any, tuple[Any, ...]], None] = {}
        for node in call_nodes(graph.graph):
            if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == namespace:
                if node.kwargs:
                    raise TypeError(f"{node.format_node()} has keyword arguments")
                found[node.target, _frozen(node.args)] = None
        return cls(tuple(found), space.slots.node.expr, space.capacity.node.expr)

    def launches(self, slots: int, device_type: str = "cuda") -> list[Launch]:
        """What a bundle of ``slots`` slots launches."""
        sizes = {self.slots: slots, self.rows: _ROWS}
        made: dict[_Like, Tensor] = {}  # most operators read the same tables
        with compat.fake_tensors(), torch.no_grad(), recording() as found:
            for operator, args in self.calls:
                kernel = compat.device_kernel(operator, device_type)
                if kernel is None:
                    continue
                try:
                    kernel(*_thawed(args, sizes, made))
                except Exception:  # whoever runs the operator gets this error; here it only costs time
                    log.info("what %s launches is not known ahead", operator, exc_info=True)
        return found

    def begin(self, device: torch.device) -> dict[int, tuple[Code, ...]]:
        """Has the first sizes' kernels compiled on other threads; what they are, where that can be kept.

        Replaying the operators to find that out takes longer than loading the kernels.
        """
        ready: dict[int, tuple[Code, ...]] = {}
        if device.type == "cuda":
            for size in ahead.FIRST_SIZES:
                codes = {launch.variant: launch.code for launch in self.launches(size) if launch.grid}
                ahead.builder.begin(codes.values())
                if all(code.named for code in codes.values()):
                    ready[size] = tuple(codes.values())
        return ready


def _frozen(value: Any) -> Any:
    """An argument as hashable data that outlives its graph."""
    if isinstance(value, Node):
        return _frozen(value.meta["val"])
    if isinstance(value, Tensor):
        strides = tuple(map(_frozen, value.stride()))
        return _Like(tuple(map(_frozen, value.shape)), strides, value.dtype, value.device)
    if isinstance(value, torch.SymInt):
        return value.node.expr
    if isinstance(value, (tuple, list)):
        return tuple(map(_frozen, value))
    return value


def _thawed(value: Any, sizes: Mapping[Any, int], made: dict[_Like, Tensor]) -> Any:
    """The reverse of :func:`_frozen` for these sizes."""
    if isinstance(value, _Like):
        tensor = made.get(value)
        if tensor is None:
            tensor = made[value] = value.make(sizes)
        return tensor
    if isinstance(value, tuple):
        return [_thawed(item, sizes, made) for item in value]
    return _number(value, sizes)


def _number(value: Any, sizes: Mapping[Any, int]) -> Any:
    """A symbolic number for these sizes; anything else as it is."""
    return int(value.xreplace(sizes)) if isinstance(value, Basic) else value

"""A learned route: how one signature of one compiled model maps to one instance, without the model's Python.

A warm call pays a few microseconds of checks in place of Dynamo's guards (40 to 300).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torch_mux import compat
from torch_mux.forms import Form
from torch_mux.plain import CONSTANTS
from torch_mux.types import FallbackReason, Quota
from torch_mux.watching import Structure, Watches

__all__ = ["ATTRIBUTE", "Arranged", "Route", "RouteTable", "Submits", "arrange", "table_of"]

ROUTE_LIMIT = 64
ATTRIBUTE = "_torch_mux_routes"
_TENSORS = (torch.Tensor, nn.Parameter)
_PLAIN = frozenset(CONSTANTS)


class Submits(Protocol):
    """The part of the engine that a route needs."""

    def submit(self, instance: Any, inputs: Sequence[object], quota: Quota) -> Any:
        """Queues one request of ``instance``."""
        ...


@dataclass(frozen=True, eq=False)
class Arranged:
    """Arguments of one call, flattened.

    Attributes:
        leaves: tensors and constants in order.
        spec: how they nest, or None where every argument is positional and a leaf itself.
        key: hashable summary of the call's modes, shapes and constants; None where a leaf is something else.
    """

    leaves: Sequence[Any]
    spec: Any
    key: tuple[object, ...] | None


def arrange(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arranged:
    """Flattens the arguments of one call; tensors in any nesting that ``torch.utils._pytree`` knows."""
    key: list[object] = [torch.is_grad_enabled(), torch.is_inference_mode_enabled()]
    leaves, spec = args, None
    if kwargs or not all(type(leaf) in _TENSORS or type(leaf) in _PLAIN for leaf in args):
        flat, spec = pytree.tree_flatten((args, kwargs))
        leaves = tuple(flat)
    for leaf in leaves:
        if type(leaf) in _TENSORS:
            key.append(leaf.shape)
        elif type(leaf) in _PLAIN:
            key.append((type(leaf), leaf))
        else:
            return Arranged(leaves, spec, None)
    return Arranged(leaves, spec, tuple(key))


@dataclass(frozen=True, eq=False)
class Route:
    """One learned signature.

    Attributes:
        engine: where its requests go.
        instance: the engine's instance of the model's weights.
        spec: nesting of the arguments (``Arranged.spec``).
        state: check of grad mode, autocast and other global state.
        tensors: positions of distinct tensor leaves.
        check: of their types, shapes, strides, dtypes and devices.
        same: pairs of leaves that must be one tensor.
        inputs: for every input of the program (True, leaf position) or (False, constant).
        structure: the model's modules.
        watches: outside values that the graph was specialised on.
        result: where every leaf of the result comes from: ("output" or "argument", position) or
            ("constant", value).
        nesting: makes the result of its leaves, or None where the result is one leaf.
    """

    engine: Submits
    instance: Any
    spec: Any
    state: Callable[[], bool]
    tensors: tuple[int, ...]
    check: Callable[..., bool]
    same: tuple[tuple[int, int], ...]
    inputs: tuple[tuple[bool, Any], ...]
    structure: Structure
    watches: Watches
    result: tuple[tuple[str, Any], ...]
    nesting: Form | None

    def matches(self, arranged: Arranged) -> bool:
        """Whether the call has this route's signature; its key is equal already."""
        leaves = arranged.leaves
        return (
            not self.instance.dropped
            and self.state()
            and self.check(*[leaves[position] for position in self.tensors])
            and not compat.active_modes()
            and (self.spec is arranged.spec or self.spec == arranged.spec)
            and all(leaves[one] is leaves[other] for one, other in self.same)
        )

    def holds(self) -> bool:
        """Whether it may serve another call."""
        return not self.instance.dropped and self.unchanged()

    def unchanged(self) -> bool:
        """Whether the model and what it was specialised on are as they were when this was learned.

        An answer that is on its way stays right when the engine is closed or reset meanwhile.
        """
        return self.structure.unchanged() and self.watches.unchanged()

    def fill(self, leaves: Sequence[Any]) -> list[object]:
        """The program's inputs in order."""
        return [leaves[value] if leaf else value for leaf, value in self.inputs]

    def finish(self, outputs: Sequence[object], leaves: Sequence[Any]) -> Any:
        """The model's result from the graph's outputs, nested as the model returned it."""
        values = [
            outputs[value] if kind == "output" else leaves[value] if kind == "argument" else value
            for kind, value in self.result
        ]
        return values[0] if self.nesting is None else self.nesting(values)


def _no_routes() -> dict[tuple[object, ...], list[Route]]:
    return {}


@dataclass(eq=False)
class RouteTable:
    """What was learned about one compiled model. It lives on the model, so that it dies with it.

    Attributes:
        epoch: the engine's epoch that the routes belong to; another one empties the table.
        routes: by ``Arranged.key``.
        refusals: signatures that stay on the guarded path, and why.
    """

    epoch: int = 0
    routes: dict[tuple[object, ...], list[Route]] = field(default_factory=_no_routes)
    refusals: dict[tuple[object, ...], FallbackReason] = field(default_factory=dict)

    def find(self, arranged: Arranged) -> Route | None:
        """The route of this signature, if one was learned; ``Route.holds`` is still to be asked."""
        if arranged.key is None:
            return None
        for route in self.routes.get(arranged.key, ()):
            if route.matches(arranged):
                return route
        return None

    def add(self, key: tuple[object, ...], route: Route) -> None:
        """Keeps ``route``; beyond ``ROUTE_LIMIT`` signatures the oldest goes."""
        while sum(map(len, self.routes.values())) >= ROUTE_LIMIT:
            self.routes.pop(next(iter(self.routes)))
        self.routes.setdefault(key, []).append(route)

    def refuse(self, key: tuple[object, ...], reason: FallbackReason) -> None:
        """Remembers that this signature stays guarded; beyond ``ROUTE_LIMIT`` the oldest is asked again."""
        while len(self.refusals) >= ROUTE_LIMIT:
            self.refusals.pop(next(iter(self.refusals)))
        self.refusals[key] = reason

    def forget(self, route: Route) -> None:
        """Drops one route, whatever it says of itself."""
        for key, routes in list(self.routes.items()):
            if route in routes:
                self.routes[key] = [other for other in routes if other is not route]

    def prune(self) -> None:
        """Forgets the routes whose model changed: they would keep its former weights alive."""
        kept = {key: [route for route in routes if route.holds()] for key, routes in self.routes.items()}
        self.routes = {key: routes for key, routes in kept.items() if routes}

    def clear(self) -> None:
        """Forgets everything; the next call of each signature is learned anew."""
        self.routes = {}
        self.refusals = {}

    def __deepcopy__(self, memo: dict[int, object]) -> RouteTable:
        return RouteTable()

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ())  # a pickled model must load where torch_mux is not installed


def table_of(model: Any, epoch: int) -> RouteTable:
    """The route table on ``model``, emptied if the engine it was learned with is gone."""
    table = vars(model).get(ATTRIBUTE)
    if table is None:
        table = vars(model)[ATTRIBUTE] = RouteTable(epoch)
    if table.epoch != epoch:
        table.clear()
        table.epoch = epoch
    result: RouteTable = table
    return result


def flat_positions(leaves: Sequence[Any]) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """Positions of distinct tensors among ``leaves``, and pairs (first, again) of repeated ones."""
    first: dict[int, int] = {}
    again = []
    for position, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            if id(leaf) in first:
                again.append((first[id(leaf)], position))
            else:
                first[id(leaf)] = position
    return tuple(first.values()), tuple(again)


def containers(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[object]:
    """Every list, tuple and dict among the arguments, and every leaf."""
    found: list[object] = [args, kwargs]
    for value in found:
        inner: Any = (
            value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        )
        found.extend(chain(inner))
    return found

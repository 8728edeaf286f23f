"""A learned route: how one signature of one compiled model maps to one instance, without the model's Python.

A warm call pays a few microseconds of checks in place of Dynamo's guards (40 to 300).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import itemgetter
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torch_mux import compat
from torch_mux.forms import Form
from torch_mux.plain import CONSTANTS
from torch_mux.types import FallbackReason, Quota
from torch_mux.watching import Structure, Watches

__all__ = ["ATTRIBUTE", "Arranged", "Here", "Route", "RouteTable", "Submits", "arrange", "table_of"]

ROUTE_LIMIT = 64
ATTRIBUTE = "_torch_mux_routes"
_TENSORS = (torch.Tensor, nn.Parameter)
_PLAIN = frozenset(CONSTANTS)

Pick = Callable[[Sequence[Any]], Sequence[Any]]
"""Takes items of a sequence in a fixed order."""


class Submits(Protocol):
    """The part of the engine that a route needs."""

    def submit(self, instance: Any, inputs: Sequence[object], quota: Quota, kick: bool = False) -> Any:
        """Queues one request of ``instance``; with ``kick`` it goes out though nobody waits for it."""
        ...


class Here:
    """The modes of this thread, looked at once for calls between which no Python of the user's runs.

    Attributes:
        grad, inference: grad and inference mode.
        modes: how many torch function and dispatch modes are active.
        held: the check of global state that succeeded last.
    """

    __slots__ = ("grad", "held", "inference", "modes")

    def __init__(self) -> None:
        self.look()

    def look(self) -> None:
        """Looks again."""
        self.grad = torch.is_grad_enabled()
        self.inference = torch.is_inference_mode_enabled()
        self.modes = compat.active_modes()
        self.held: Callable[[], bool] | None = None

    def holds(self, state: Callable[[], bool]) -> bool:
        """Whether this check of grad mode, autocast and other global state succeeds."""
        if state is self.held:
            return True
        if not state():
            return False
        self.held = state
        return True


@dataclass(eq=False, slots=True)
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


def arrange(args: tuple[Any, ...], kwargs: dict[str, Any], here: Here | None = None) -> Arranged:
    """Flattens the arguments of one call; tensors in any nesting that ``torch.utils._pytree`` knows.

    Args:
        here: the modes of this thread where they have been looked at.
    """
    here = here or Here()
    grad, inference = here.grad, here.inference
    if not kwargs:
        key = _key(args, grad, inference)
        if key is not None:
            return Arranged(args, None, key)
    flat, spec = pytree.tree_flatten((args, kwargs))
    here.look()  # classes may bring the Python that flattens them
    leaves = tuple(flat)
    return Arranged(leaves, spec, _key(leaves, grad, inference))


def _key(leaves: Sequence[Any], grad: bool, inference: bool) -> tuple[object, ...] | None:
    """``Arranged.key``, or None where a leaf is neither a tensor nor a constant."""
    key: list[object] = [grad, inference]
    for leaf in leaves:
        kind = type(leaf)
        if kind in _TENSORS:
            key.append(leaf.shape)
        elif kind in _PLAIN:
            key.append((kind, leaf))
        else:
            return None
    return tuple(key)


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
        checked: picks the tensors to check from the leaves.
        fill: makes the program's inputs in order of the leaves.
        places: (source, position) of every leaf of the result; the sources are outputs, leaves and constants.
        constants: those of the result.
        single: the position of the one output that is the result, where that is all.
        plain: whether its arguments are positional tensors, each there once, and nothing else.
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
    checked: Pick = field(init=False)
    fill: Pick = field(init=False)
    places: tuple[tuple[int, int], ...] = field(init=False)
    constants: tuple[object, ...] = field(init=False)
    single: int | None = field(init=False)
    plain: bool = field(init=False)

    def __post_init__(self) -> None:
        constants: list[object] = []
        places: list[tuple[int, int]] = []
        for kind, value in self.result:
            if kind == "constant":
                places.append((2, len(constants)))
                constants.append(value)
            else:
                places.append((0 if kind == "output" else 1, value))
        object.__setattr__(self, "checked", _picking(self.tensors))
        object.__setattr__(self, "fill", _filling(self.inputs))
        object.__setattr__(self, "places", tuple(places))
        object.__setattr__(self, "constants", tuple(constants))
        one = self.nesting is None and len(places) == 1 and places[0][0] == 0
        object.__setattr__(self, "single", places[0][1] if one else None)
        plain = self.spec is None and not self.same and self.tensors == tuple(range(len(self.tensors)))
        object.__setattr__(self, "plain", plain)

    def matches(self, arranged: Arranged, here: Here | None = None) -> bool:
        """Whether the call has this route's signature; its key is equal already."""
        here, leaves = here or Here(), arranged.leaves
        return (
            not self.instance.dropped
            and here.holds(self.state)
            and self.check(*self.checked(leaves))
            and not here.modes
            and (self.spec is arranged.spec or self.spec == arranged.spec)
            and (not self.same or all(leaves[one] is leaves[other] for one, other in self.same))
        )

    def holds(self) -> bool:
        """Whether it may serve another call."""
        return not self.instance.dropped and self.unchanged()

    def unchanged(self) -> bool:
        """Whether the model and what it was specialised on are as they were when this was learned.

        An answer that is on its way stays right when the engine is closed or reset meanwhile.
        """
        return self.structure.unchanged() and self.watches.unchanged()

    def finish(self, outputs: Sequence[object], leaves: Sequence[Any]) -> Any:
        """The model's result from the graph's outputs, nested as the model returned it."""
        if self.single is not None:
            return outputs[self.single]
        sources = (outputs, leaves, self.constants)
        values = [sources[source][position] for source, position in self.places]
        return values[0] if self.nesting is None else self.nesting(values)


def _picking(positions: Sequence[int]) -> Pick:
    """What picks the items at ``positions`` of a sequence."""
    first = positions[0] if positions else 0
    neighbours = slice(first, first + len(positions))
    if list(positions) == list(range(neighbours.start, neighbours.stop)):
        return itemgetter(neighbours)
    return itemgetter(*positions)


def _filling(inputs: Sequence[tuple[bool, Any]]) -> Pick:
    """What makes a program's inputs of the leaves of a call; see ``Route.inputs``."""
    if all(leaf for leaf, _ in inputs):
        return _picking([position for _, position in inputs])
    return lambda leaves: [leaves[value] if leaf else value for leaf, value in inputs]


class Again:
    """What tells that a call has the signature of the last one: most have.

    Args:
        route: a :attr:`Route.plain` one.
        key: ``Arranged.key`` of its calls. What it says of tensors the route's check says too.
    """

    __slots__ = ("_check", "_count", "_grad", "_inference", "_instance", "_state", "key", "route")

    def __init__(self, route: Route, key: tuple[object, ...]) -> None:
        self.route, self.key = route, key
        self._grad, self._inference, *leaves = key
        self._count = len(leaves) if len(leaves) == len(route.tensors) else -1
        self._instance, self._state, self._check = route.instance, route.state, route.check

    def fits(self, args: tuple[Any, ...], here: Here) -> bool:
        """Whether a call with these positional arguments is one again, without its key."""
        return (
            len(args) == self._count
            and here.grad is self._grad
            and here.inference is self._inference
            and not self._instance.dropped
            and (here.held is self._state or here.holds(self._state))
            and self._check(*args)
            and not here.modes
        )


def _no_routes() -> dict[tuple[object, ...], list[Route]]:
    return {}


@dataclass(eq=False)
class RouteTable:
    """What was learned about one compiled model. It lives on the model, so that it dies with it.

    Attributes:
        epoch: the engine's epoch that the routes belong to; another one empties the table.
        routes: by ``Arranged.key``.
        refusals: signatures that stay on the guarded path, and why.
        last: recognises the signature of the last call that was found, or None.
    """

    epoch: int = 0
    routes: dict[tuple[object, ...], list[Route]] = field(default_factory=_no_routes)
    refusals: dict[tuple[object, ...], FallbackReason] = field(default_factory=dict)
    last: Again | None = field(default=None, init=False)

    def find(self, arranged: Arranged, here: Here | None = None) -> Route | None:
        """The route of this signature, if one was learned; ``Route.holds`` is still to be asked."""
        if arranged.key is None:
            return None
        for route in self.routes.get(arranged.key, ()):
            if route.matches(arranged, here):
                self.last = Again(route, arranged.key) if route.plain else None
                return route
        return None

    def add(self, key: tuple[object, ...], route: Route) -> None:
        """Keeps ``route``; beyond ``ROUTE_LIMIT`` signatures the oldest goes."""
        while sum(map(len, self.routes.values())) >= ROUTE_LIMIT:
            self.routes.pop(next(iter(self.routes)))
        self.routes.setdefault(key, []).append(route)
        self.last = None

    def refuse(self, key: tuple[object, ...], reason: FallbackReason) -> None:
        """Remembers that this signature stays guarded; beyond ``ROUTE_LIMIT`` the oldest is asked again."""
        while len(self.refusals) >= ROUTE_LIMIT:
            self.refusals.pop(next(iter(self.refusals)))
        self.refusals[key] = reason

    def forget(self, route: Route) -> None:
        """Drops one route, whatever it says of itself."""
        self.last = None
        for key, routes in list(self.routes.items()):
            if route in routes:
                self.routes[key] = [other for other in routes if other is not route]

    def prune(self) -> None:
        """Forgets the routes whose model changed: they would keep its former weights alive."""
        self.last = None
        kept = {key: [route for route in routes if route.holds()] for key, routes in self.routes.items()}
        self.routes = {key: routes for key, routes in kept.items() if routes}

    def clear(self) -> None:
        """Forgets everything; the next call of each signature is learned anew."""
        self.last = None
        self.routes = {}
        self.refusals = {}

    def __deepcopy__(self, memo: dict[int, object]) -> RouteTable:
        return RouteTable()

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ())  # a pickled model must load where torch_mux is not installed


def table_of(model: Any, epoch: int) -> RouteTable:
    """The route table on ``model``, emptied if the engine it was learned with is gone."""
    known = vars(model)
    table = known.get(ATTRIBUTE)
    if table is None:
        table = known[ATTRIBUTE] = RouteTable(epoch)
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

"""How a result is nested, and how the like of it is made from other leaves.

Containers and plain objects are made as Dynamo's own frames make them: by ``__new__`` and their items and
attributes, without running the Python of their class. That is exact, and ten times faster than the
constructor of an output class of transformers.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import nn

from torch_mux.plain import CONSTANTS

__all__ = ["Form", "Formless", "form"]

Form = Callable[[Sequence[Any]], Any]
"""Makes a result from its leaves in order."""

_NEW = (object.__new__, dict.__new__, OrderedDict.__new__)


class Formless(Exception):
    """Why the like of a result cannot be made."""


def form(result: Any, arguments: Iterable[object]) -> tuple[list[Any], Form]:
    """The leaves of ``result``, and what makes the like of it from others.

    Args:
        result: tensors and constants in lists, tuples, dicts, and objects of them.
        arguments: containers of the call's arguments, which a result may not hold: it would get a copy.

    Raises:
        Formless: it holds something that cannot be made anew.
    """
    reader = _Reader({id(value) for value in arguments})
    made = reader.read(result)
    return reader.leaves, itemgetter(made) if isinstance(made, int) else made


class _Reader:
    def __init__(self, taken: set[int]) -> None:
        self.leaves: list[Any] = []
        self.positions: dict[int, int] = {}
        self.taken = taken

    def read(self, value: Any) -> Form | int:
        """What makes the like of ``value``, or the position of a leaf."""
        if isinstance(value, torch.Tensor) or type(value) in CONSTANTS:
            position = self.positions.setdefault(id(value), len(self.leaves))
            if position == len(self.leaves):
                self.leaves.append(value)
            return position
        kind = type(value)
        if kind is tuple:
            children = self._all(value)
            return lambda leaves: tuple(children(leaves))
        if issubclass(kind, tuple):
            return self._named(kind, value)
        if id(value) in self.taken:
            raise Formless(f"it returns one {kind.__name__} twice, or one of its arguments")
        self.taken.add(id(value))
        if kind is list:
            children = self._all(value)
            return lambda leaves: list(children(leaves))
        if kind is deque:
            children, most = self._all(value), value.maxlen
            return lambda leaves: deque(children(leaves), most)
        if kind in (dict, defaultdict):
            return self._dict(value)
        return self._object(kind, value)

    def _all(self, values: Iterable[Any]) -> Form:
        """What makes the like of all of ``values``, in order."""
        read = [self.read(value) for value in values]
        if len(read) > 1 and all(isinstance(child, int) for child in read):
            return itemgetter(*read)
        children = [itemgetter(child) if isinstance(child, int) else child for child in read]
        return lambda leaves: [child(leaves) for child in children]

    def _keys(self, value: dict[Any, Any]) -> list[Any]:
        keys = list(dict.keys(value))
        if not all(type(key) in CONSTANTS for key in keys):
            raise Formless("it returns a dict with a key that is no constant")
        return keys

    def _dict(self, value: dict[Any, Any]) -> Form:
        keys, children = self._keys(value), self._all(dict.values(value))
        if not isinstance(value, defaultdict):
            return lambda leaves: dict(zip(keys, children(leaves), strict=True))
        missing = value.default_factory
        return lambda leaves: defaultdict(missing, zip(keys, children(leaves), strict=True))

    def _named(self, kind: type, value: Any) -> Form:
        """Named tuples, and the sequences that operators such as ``max`` return."""
        children = self._all(value)
        if hasattr(kind, "n_sequence_fields"):
            make: Any = kind
            return lambda leaves: make(children(leaves))
        if getattr(value, "__dict__", None):
            raise Formless(f"it returns a {kind.__name__} with attributes of its own")
        return lambda leaves: tuple.__new__(kind, children(leaves))

    def _object(self, kind: type, value: Any) -> Form:
        """An object that is its items and attributes and nothing else."""
        attributes = getattr(value, "__dict__", {} if kind is OrderedDict else None)
        if (
            type(attributes) is not dict
            or not any(kind.__new__ is new for new in _NEW)
            or isinstance(value, (nn.Module, type))
            or any(getattr(base, "__slots__", ()) for base in kind.__mro__)
        ):
            raise Formless(f"it returns a {kind.__name__}")
        mapping = isinstance(value, dict)
        keys, items = self._keys(value) if mapping else [], self._all(dict.values(value) if mapping else ())
        names, fields = list(attributes), self._all(attributes.values())
        new: Any = kind.__new__
        put: Any = OrderedDict.__setitem__ if issubclass(kind, OrderedDict) else dict.__setitem__

        def make(leaves: Sequence[Any]) -> Any:
            made = new(kind)
            for key, item in zip(keys, items(leaves), strict=True):
                put(made, key, item)
            if names:
                made.__dict__.update(zip(names, fields(leaves), strict=True))
            return made

        return make

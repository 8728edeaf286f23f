"""How a result is nested, and how the like of it is made from other leaves.

Containers and plain objects are made as Dynamo's own frames make them: by ``__new__`` and their items and
attributes, without running the Python of their class. That is exact, and some fifty times faster than the
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
    return reader.leaves, reader.read(result)


class _Reader:
    def __init__(self, taken: set[int]) -> None:
        self.leaves: list[Any] = []
        self.positions: dict[int, int] = {}
        self.taken = taken

    def read(self, value: Any) -> Form:
        """What makes the like of ``value``."""
        if isinstance(value, torch.Tensor) or type(value) in CONSTANTS:
            return self._leaf(value)
        kind = type(value)
        if kind is tuple:
            children = self._all(value)
            return lambda leaves: tuple([child(leaves) for child in children])
        if issubclass(kind, tuple):
            return self._named(kind, value)
        if id(value) in self.taken:
            raise Formless(f"it returns one {kind.__name__} twice, or one of its arguments")
        self.taken.add(id(value))
        if kind in (list, deque):
            children = self._all(value)
            if kind is list:
                return lambda leaves: [child(leaves) for child in children]
            most = value.maxlen
            return lambda leaves: deque([child(leaves) for child in children], most)
        if kind is dict:
            keys, children = self._keys(value), self._all(dict.values(value))
            return lambda leaves: {key: child(leaves) for key, child in zip(keys, children, strict=True)}
        if kind is defaultdict:
            keys, children, missing = self._keys(value), self._all(dict.values(value)), value.default_factory
            return lambda leaves: defaultdict(
                missing, {key: child(leaves) for key, child in zip(keys, children, strict=True)}
            )
        return self._object(kind, value)

    def _leaf(self, value: Any) -> Form:
        position = self.positions.setdefault(id(value), len(self.leaves))
        if position == len(self.leaves):
            self.leaves.append(value)
        return itemgetter(position)

    def _all(self, values: Iterable[Any]) -> list[Form]:
        return [self.read(value) for value in values]

    def _keys(self, value: dict[Any, Any]) -> list[Any]:
        keys = list(dict.keys(value))
        if not all(type(key) in CONSTANTS for key in keys):
            raise Formless("it returns a dict with a key that is no constant")
        return keys

    def _named(self, kind: type, value: Any) -> Form:
        """Named tuples, and the sequences that operators such as ``max`` return."""
        children = self._all(value)
        if hasattr(kind, "n_sequence_fields"):
            make: Any = kind
            return lambda leaves: make([child(leaves) for child in children])
        if getattr(value, "__dict__", None):
            raise Formless(f"it returns a {kind.__name__} with attributes of its own")
        return lambda leaves: tuple.__new__(kind, [child(leaves) for child in children])

    def _object(self, kind: type, value: Any) -> Form:
        """An object that is its items and attributes and nothing else."""
        ordered, mapping = issubclass(kind, OrderedDict), issubclass(kind, dict)
        attributes = getattr(value, "__dict__", {} if kind is OrderedDict else None)
        if (
            type(attributes) is not dict
            or not any(kind.__new__ is new for new in _NEW)
            or isinstance(value, (nn.Module, type))
            or any(getattr(base, "__slots__", ()) for base in kind.__mro__)
        ):
            raise Formless(f"it returns a {kind.__name__}")
        keys = self._keys(value) if mapping else []
        items = self._all(dict.values(value)) if mapping else []
        names, fields = list(attributes), self._all(attributes.values())
        new: Any = kind.__new__
        put: Any = OrderedDict.__setitem__ if ordered else dict.__setitem__

        def make(leaves: Sequence[Any]) -> Any:
            made = new(kind)
            for key, item in zip(keys, items, strict=True):
                put(made, key, item(leaves))
            if names:
                made.__dict__.update(zip(names, [field(leaves) for field in fields], strict=True))
            return made

        return make

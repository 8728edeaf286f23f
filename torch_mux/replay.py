"""What a rewritten frame does between its graph and its return, without doing it.

Dynamo replays side effects (counters, list appends, attribute writes) after the graph, in the frame's own
bytecode. A learned call leaves the frame out, so nothing of that may matter. ``Replay`` says what each
operation means for abstract values (``instructions`` walks the bytecode). Objects that the frame has just
made may be filled at will; those that were there before may be read, and written with what they hold already.
That covers state that a call sets and undoes: a flag, a global, a stack that is pushed and popped. What is
read or written back is handed out to be watched, so that a learned call notices when it no longer is so.
What is not understood is refused.
"""

from __future__ import annotations

import builtins
import inspect
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import BuiltinFunctionType, MethodDescriptorType, ModuleType, WrapperDescriptorType
from typing import Any

import torch
from torch import nn

from torch_mux import compat
from torch_mux.plain import CONSTANTS, alike

__all__ = ["NULL", "Bound", "Known", "Made", "Refusal", "Replay", "Rest"]

Rest = tuple[str, Any, Any, object]
"""("attribute" or "item", holder, key, value): what a frame read or wrote back after its graph."""

_CONTAINERS = (list, dict, tuple, set, frozenset, OrderedDict, deque)
_FILLS = {"update", "append", "extend", "insert", "add", "clear", "items", "keys", "values", "move_to_end"}
_PLAIN_SETATTR: tuple[object, ...] = (
    object.__setattr__,
    nn.Module.__setattr__,
    type.__setattr__,
    ModuleType.__setattr__,
)


class Refusal(Exception):
    """Why a frame has to run on every call."""


@dataclass(eq=False)
class Made:
    """An object that the frame made itself, or got from its graph.

    Attributes:
        kind: its type, or None where unknown.
        items: what it holds: a list of (key, value), or of values, or None where unknown.
    """

    kind: type | None = None
    items: list[Any] | None = None


@dataclass(frozen=True, eq=False)
class Known:
    """An object that was there before the graph ran."""

    value: Any
    name: str = ""


@dataclass(frozen=True, eq=False)
class Bound:
    """A method of something that the frame made."""

    target: Made
    name: str


class _Null:
    """The empty slot beside a callable."""


NULL = _Null()


@dataclass(eq=False)
class Replay:
    """What the instructions after a graph's call do.

    Attributes:
        local: the frame's local values by name when the graph was called.
        namespace: its globals.
        fresh: names of locals that are the frame's own containers (``**kwargs``).
        rests: what was read or written back, in order.
    """

    local: dict[str, object]
    namespace: dict[str, Any]
    fresh: frozenset[str] = frozenset()
    rests: list[Rest] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stack: list[Any] = [Made()]
        self.names: dict[str, Any] = {name: Made(dict) for name in self.fresh}
        self.cleared: list[Any] = []
        self.returned = False

    # What an operation may use, and what it notes.

    def plain(self, value: Any) -> Any:
        """``value``, where it may become part of something that the frame returns or keeps."""
        if isinstance(value, Known):
            if _is_plain(value.value):
                return value
            raise Refusal(f"the frame uses {value.name or type(value.value).__name__!r} after its graph")
        if isinstance(value, Made):
            return value
        raise Refusal("the frame uses a method after its graph")

    def note(self, step: str, holder: Any, key: Any, value: object) -> None:
        """Something that must stay as it is."""
        self.rests.append((step, holder, key, value))

    def same(self, step: str, holder: Any, key: Any, held: object, value: Any) -> None:
        """A write to what was there before: allowed where it changes nothing."""
        if not isinstance(value, Known) or not alike(held, value.value):
            raise Refusal(f"side effect: {step} {key!r} is written")
        self.note("item" if step == "global" else step, holder, key, held)

    # Attributes and items.

    def load(self, target: Any, name: str) -> Any:
        """``target.name``."""
        if isinstance(target, Made):
            return Bound(target, name)
        if not isinstance(target, Known):
            raise Refusal(f"the frame uses {name!r} after its graph")
        try:
            value = getattr(target.value, name)
        except Exception as error:
            raise Refusal(f"the frame reads {name!r} after its graph, which is gone") from error
        if getattr(value, "__self__", None) is target.value and callable(value):
            return Known(value, name)  # a method: code, and a new object at every look
        if not isinstance(target.value, (ModuleType, type)) or not isinstance(value, (ModuleType, type)):
            self.note("attribute", target.value, name, value)
        return Known(value, name)

    def subscript(self, target: Any, key: Any) -> Any:
        """``target[key]``."""
        if isinstance(target, Made):
            return Made()
        if not (isinstance(target, Known) and isinstance(key, Known)):
            raise Refusal("the frame looks something up after its graph")
        if type(target.value) not in _CONTAINERS or not isinstance(key.value, CONSTANTS):
            raise Refusal(f"the frame uses {target.name or 'a container'!r} after its graph")
        try:
            value = target.value[key.value]
        except LookupError:
            raise Refusal(f"the frame reads {key.value!r} after its graph, which is gone") from None
        self.note("item", target.value, key.value, value)
        return Known(value, f"{target.name}[{key.value!r}]")

    def set_attribute(self, target: Any, name: Any, value: Any, raw: bool) -> None:
        """``target.name = value``, past any ``__setattr__`` where ``raw``."""
        name = name.value if isinstance(name, Known) else name
        if isinstance(target, Made):
            if target.kind is None or not (raw or _simple(target.kind, name)):
                raise Refusal(f"side effect: attribute {name!r} is written")
            self.plain(value)
            return
        if not isinstance(target, Known) or not (raw or _simple(type(target.value), name)):
            raise Refusal(f"side effect: attribute {name!r} is written")
        held = vars(target.value).get(name, NULL) if hasattr(target.value, "__dict__") else NULL
        if held is NULL:
            held = inspect.getattr_static(target.value, name, NULL) if not raw else NULL
        self.same("attribute", target.value, name, held, value)

    def set_global(self, name: str, value: Any) -> None:
        """``global name; name = value``."""
        self.same("global", self.namespace, name, self.namespace.get(name, NULL), value)

    def set_item(self, target: Any, key: Any, value: Any) -> None:
        """``target[key] = value``, or ``target[:] = value``."""
        if isinstance(target, Made) and target.kind in _CONTAINERS:
            self.plain(value)
            target.items = None
            return
        found: Any = target.value if isinstance(target, Known) else None
        if type(found) is list and isinstance(key, slice):
            self._same_items(found, value)
        elif type(found) in (dict, OrderedDict) and isinstance(key, Known):
            self.same("item", found, key.value, found.get(key.value, NULL), value)
        else:
            raise Refusal("side effect: an item is written")

    def _same_items(self, held: list[Any], value: Any) -> None:
        items = value.items if isinstance(value, Made) and value.kind is list else None
        if items is None or len(items) != len(held):
            raise Refusal("side effect: a list is written")
        for position, (old, new) in enumerate(zip(held, items, strict=True)):
            self.same("item", held, position, old, new)
        self.note("size", held, None, len(held))

    def _refill(self, held: dict[Any, Any], value: Any) -> None:
        items = value.items if isinstance(value, Made) and value.kind is dict else None
        emptied = any(held is other for other in self.cleared)
        if items is None or (emptied and [key for key, _ in items] != list(held)):
            raise Refusal("side effect: a dict is written")
        for key, new in items:
            self.same("item", held, key, held.get(key, NULL), new)
        self.cleared = [other for other in self.cleared if other is not held]
        self.note("size", held, None, len(held))

    # Calls.

    def call(self, function: Any, args: list[Any], keywords: Sequence[str] = ()) -> Any:
        """What ``function(*args)`` gives; the last of ``args`` belong to ``keywords``."""
        if isinstance(function, Bound):
            return self._method(function, args)
        if not isinstance(function, Known):
            raise Refusal("the frame calls something after its graph")
        target = function.value
        holder = getattr(target, "__self__", None)
        if len(args) == 3 and (target is compat.replayed_setattr() or target is object.__setattr__):
            self.set_attribute(args[0], args[1], args[2], raw=True)
            return Known(None)
        if target is type and len(args) == 1 and not keywords:
            return self._type(args[0])
        if isinstance(target, type):
            return self._construct(target, args)
        if (
            isinstance(holder, type)
            and issubclass(holder, tuple)
            and target == getattr(holder, "_make", None)
        ):
            return self._construct(holder, args)  # of a named tuple
        if _makes(target) and args and isinstance(args[0], Known) and isinstance(args[0].value, type):
            for value in args[1:]:
                self.plain(value)
            return Made(args[0].value)
        if isinstance(target, (MethodDescriptorType, WrapperDescriptorType)) and args:
            return self._unbound(target, args)
        if isinstance(target, BuiltinFunctionType) and isinstance(holder, dict):
            return self._existing(holder, target.__name__, args)
        raise Refusal(f"the frame uses {function.name or 'a function'!r} after its graph")

    def _type(self, value: Any) -> Known:
        kind = value.kind if isinstance(value, Made) else type(value.value)
        if kind is None:
            raise Refusal("the frame asks for a type after its graph")
        return Known(kind, "type")

    def _construct(self, kind: type, args: list[Any]) -> Made:
        for value in args:
            self.plain(value)
        return Made(kind, [] if not args and kind in (list, dict) else None)

    def _method(self, function: Bound, args: list[Any]) -> Made:
        target, name = function.target, function.name
        if target.kind not in _CONTAINERS or name not in _FILLS:
            raise Refusal(f"the frame calls {name!r} after its graph")
        for value in args:
            self.plain(value)
        if name not in ("items", "keys", "values"):
            target.items = None
        return Made()

    def _unbound(self, function: Any, args: list[Any]) -> Any:
        target, *values = args
        if not isinstance(target, Made) or function.__objclass__ not in _CONTAINERS:
            raise Refusal(f"side effect: {function.__name__} of something that was there before")
        for value in values:
            self.plain(value)
        target.items = None
        return Made()

    def _existing(self, held: dict[Any, Any], name: str, args: list[Any]) -> Any:
        if type(held) not in (dict, OrderedDict):
            raise Refusal(f"side effect: {name} of a {type(held).__name__} that was there before")
        if name == "clear" and not args:
            self.cleared.append(held)
            self.note("size", held, None, len(held))
        elif name == "update" and len(args) == 1:
            self._refill(held, args[0])
        else:
            raise Refusal(f"side effect: {name} of a dict that was there before")
        return Known(None)

    def finish(self, value: Any) -> None:
        """The frame returns ``value``."""
        self.plain(value)
        if any(self.cleared):
            raise Refusal("side effect: a dict is emptied")
        self.returned = True

    def named(self, name: str) -> Any:
        """The local variable ``name``."""
        if name in self.names:
            return self.names[name]
        if name not in self.local:
            raise Refusal(f"the frame uses {name!r} after its graph, which is not set")
        return Known(self.local[name], name)

    def globe(self, name: str) -> Known:
        """The global or built-in ``name``."""
        if name in self.namespace:
            value = self.namespace[name]
            if not isinstance(value, (ModuleType, type)):
                self.note("item", self.namespace, name, value)
            return Known(value, name)
        return Known(getattr(builtins, name, None), name)


def _is_plain(value: object) -> bool:
    """Whether ``value`` may become part of a result: it is matched by identity, or never changes."""
    if type(value) in (tuple, frozenset):
        return all(map(_is_plain, value))  # type: ignore[call-overload]
    return isinstance(value, (torch.Tensor, type, *CONSTANTS))


def _simple(kind: type | None, name: str) -> bool:
    """Whether setting attribute ``name`` of a ``kind`` does nothing but store it."""
    if kind is None or not any(kind.__setattr__ is known for known in _PLAIN_SETATTR):
        return False
    return not hasattr(inspect.getattr_static(kind, name, None), "__set__")


def _makes(function: object) -> bool:
    """Whether ``function(cls, ...)`` makes an object without running Python of its class."""
    if any(function is known for known in compat.replayed_constructors()):
        return True
    return isinstance(function, BuiltinFunctionType) and function.__name__ == "__new__"

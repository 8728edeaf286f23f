"""What a learned call rests on beyond its arguments, and whether that still holds.

Two parts. ``Structure`` covers the modules of a model: parameter, buffer and submodule slots by identity,
training flags and hooks. ``watches`` covers values that the captured frame was guarded on and that are
neither arguments nor module structure: globals, configuration objects, nested containers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from torch_mux import compat
from torch_mux.guard_sources import Computed, Source, Unwatchable, sources_of, steps_of
from torch_mux.plain import CONSTANTS, alike
from torch_mux.recording import Frame

__all__ = ["Reached", "Structure", "Unwatchable", "Watches", "watches"]

_LIMIT = 1024
_BUILTINS: dict[str, Callable[[Any], Any]] = {"type": type}
_FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType, type, ModuleType)
_STRUCTURE = frozenset(
    "_parameters _buffers _modules _forward_hooks _forward_pre_hooks _backward_hooks _backward_pre_hooks "
    "_forward_hooks_with_kwargs _forward_pre_hooks_with_kwargs _forward_hooks_always_called training "
    "__dict__ forward __class__ _non_persistent_buffers_set".split()
)
_ABSENT = object()


@dataclass(frozen=True, eq=False)
class Structure:
    """The modules below one model as they were when a call was learned.

    Attributes:
        tables: every ``_parameters``, ``_buffers`` and ``_modules`` dict that is not empty.
        values: what they held, in order.
        flags: ``__dict__`` of every module whose ``training`` flag the model looks at.
        training: those flags.
        hooks: every forward hook dict, and every table that was empty; all must be empty.
        still: whether any of these dicts was written since they were last compared.
    """

    tables: tuple[dict[Any, Any], ...]
    values: list[object]
    flags: tuple[dict[str, Any], ...]
    training: list[bool]
    hooks: tuple[dict[Any, Any], ...]
    still: compat.native.Stillness

    @classmethod
    def of(
        cls,
        roots: Sequence[nn.Module],
        flags: Sequence[dict[str, Any]],
        hooks: Sequence[dict[Any, Any]] = (),
    ) -> Structure:
        """The structure below ``roots`` now.

        Args:
            roots: modules that the captured frame reaches.
            flags: ``__dict__`` of modules whose ``training`` flag was looked at.
            hooks: further hook dicts that must stay empty.
        """
        modules = list(dict.fromkeys(module for root in roots for module in root.modules()))
        tables: list[dict[Any, Any]] = [
            table for m in modules for table in (m._parameters, m._buffers, m._modules)
        ]
        own = [table for m in modules for table in (m._forward_hooks, m._forward_pre_hooks)]
        full = tuple(table for table in tables if table)
        still = compat.native.Stillness([*tables, *own, *hooks, *flags])
        return cls(
            full,
            list(chain.from_iterable(table.values() for table in full)),
            tuple(flags),
            [table["training"] for table in flags],
            (*hooks, *own, *(table for table in tables if not table)),
            still,
        )

    def unchanged(self) -> bool:
        """Whether every slot holds the same object, every flag its value, and nothing was added."""
        return self.still.confirmed(self._same)

    def _same(self) -> bool:
        return compat.native.checks().same(
            self.tables, self.values, self.hooks, self.flags, "training", self.training
        )


def _empty() -> list[tuple[Any, Any, object]]:
    return []


@dataclass(eq=False)
class Watches:
    """Values found by (container, key), compared on every learned call: by identity, plain ones by value.

    Attributes:
        entries: of dicts, whose writes :class:`torch_mux.compat.native.Stillness` may count.
        keys: (dict, which in its order, key).
        items: of other containers.
        attributes: of objects that compute them or hold them in slots.
        sizes: containers and how many items they have.
    """

    entries: list[tuple[dict[Any, Any], Any, object]] = field(default_factory=_empty)
    keys: list[tuple[dict[Any, Any], int, object]] = field(default_factory=_empty)
    items: list[tuple[Any, Any, object]] = field(default_factory=_empty)
    attributes: list[tuple[Any, str, object]] = field(default_factory=_empty)
    sizes: list[tuple[Any, int]] = field(default_factory=list)
    _still: compat.native.Stillness | None = field(default=None)

    def unchanged(self) -> bool:
        """Whether every watched value is what it was."""
        return (not (self.entries or self.keys) or self._confirmed()) and (
            not (self.sizes or self.items or self.attributes) or self._others()
        )

    def _confirmed(self) -> bool:
        if self._still is None:
            tables = [table for table, _, _ in (*self.entries, *self.keys)]
            self._still = compat.native.Stillness({id(table): table for table in tables}.values())
        return self._still.confirmed(self._tables_hold)

    def _tables_hold(self) -> bool:
        for table, key, value in self.entries:
            found = table.get(key, _ABSENT)
            if found is not value and not alike(found, value):
                return False
        return all(alike(_nth_key(table, place), key) for table, place, key in self.keys)

    def _others(self) -> bool:
        for container, size in self.sizes:
            if len(container) != size:
                return False
        try:
            for container, key, value in self.items:
                if not alike(container[key], value):
                    return False
        except (KeyError, IndexError):
            return False
        return not self.attributes or all(
            alike(getattr(holder, name, _ABSENT), value) for holder, name, value in self.attributes
        )

    def add(self, step: str, parent: Any, key: Any, value: object) -> None:
        """Watch ``parent.key`` (step "attribute"), ``parent[key]`` ("item") or ``list(parent)[key]`` ("key").

        An attribute whose ``value`` is ``_ABSENT`` has to stay absent; if its ``step`` is "absent", from the
        object's own dict.
        """
        if len(self.entries) + len(self.items) + len(self.attributes) >= _LIMIT:
            raise Unwatchable(f"it depends on more than {_LIMIT} outside values")
        self._still = None
        if step == "key":
            self.keys.append((parent, key, value))
        elif step == "absent":
            self.entries.append((parent.__dict__, key, value))
        elif step == "item":
            (self.entries if type(parent) is dict else self.items).append((parent, key, value))
        elif type(getattr(parent, "__dict__", None)) is dict and key in parent.__dict__:
            self.entries.append((parent.__dict__, key, value))
        else:
            self.attributes.append((parent, key, value))


@dataclass(frozen=True, eq=False)
class Reached:
    """What the guards of one frame lead to.

    Attributes:
        watches: values to watch.
        roots: outermost modules.
        flags: ``__dict__`` of every module whose ``training`` flag is guarded.
    """

    watches: Watches
    roots: list[nn.Module]
    flags: list[dict[str, Any]]


def watches(guards: Iterable[str], frame: Frame, arguments: Sequence[object]) -> Reached:
    """What to watch for ``guards`` to stay true, and the modules they reach.

    Args:
        guards: what the captured frame is guarded on, as source expressions.
        frame: the frame that was rewritten, as one call saw it.
        arguments: containers and leaves of that call's arguments; its signature covers them.

    Raises:
        Unwatchable: a guard on something that cannot be watched cheaply.
    """
    walk = _Walk(frame, {id(value) for value in arguments} | _variadic(frame))
    for (scope, root), source in sources_of(tuple(guards)).items():
        walk.follow(scope, root, source)
    for step, holder, key, value in frame.rests:
        walk.rest(step, holder, key, value)
    if not walk.result.unchanged():
        raise Unwatchable("it depends on attributes that are computed at every look")
    return Reached(walk.result, walk.roots, list(walk.flags.values()))


def _variadic(frame: Frame) -> set[int]:
    """Ids of the frame's ``*args`` and ``**kwargs``, which are fresh containers of arguments."""
    code = frame.code
    first = code.co_argcount + code.co_kwonlyargcount
    count = bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    return {id(frame.values.get(name)) for name in code.co_varnames[first : first + count]}


class _Walk:
    """Follows guards from the frame's names to their values, one at a time."""

    def __init__(self, frame: Frame, covered: set[int]) -> None:
        self.frame = frame
        self.covered = covered
        self.result = Watches()
        self.roots: list[nn.Module] = []
        self.flags: dict[int, dict[str, Any]] = {}
        self.seen: set[tuple[int, str, object]] = set()
        self.members: set[int] = set()
        for value in frame.values.values():
            if isinstance(value, nn.Module):
                self._adopt(value)

    def _adopt(self, module: nn.Module) -> None:
        if id(module) not in self.members:
            self.roots.append(module)
            self.members.update(map(id, module.modules()))

    def follow(self, scope: str, root: str, source: Source) -> None:
        """Walks the guards that start at a local or global name, watching the steps that can change."""
        table = self.frame.values if scope == "L" else self.frame.namespace
        if root not in table:
            raise Unwatchable(f"it depends on {source.name}, which is gone")
        value: Any = table[root]
        if scope == "G":
            self._step("item", table, root, value)
        elif id(value) in self.covered or (
            isinstance(value, (torch.Tensor, *CONSTANTS)) and not self._free(root)
        ):
            return
        elif self._free(root) and not isinstance(value, (nn.Module, *_FUNCTIONS)):
            raise Unwatchable(f"it depends on the closure variable {root!r}")
        if source.ends:
            self._last(source.name, value)
        self._follow(value, source)

    def _follow(self, parent: Any, source: Source) -> None:
        if isinstance(parent, type):
            return  # code: what a class holds is frozen until refresh
        for (kind, key), step in source.steps.items():
            if isinstance(key, Computed):
                key = self._key(key.name)
            if kind == "presence":  # what is there has a guard of its own where it is read
                if not hasattr(parent, key):
                    self.result.add(self._absence(parent, key), parent, key, _ABSENT)
                continue
            try:
                value = _look_up(kind, key, parent)
            except AttributeError:
                if kind == "attribute" and not step.steps:  # guarded on its absence, as by hasattr
                    self.result.add(self._absence(parent, key), parent, key, _ABSENT)
                    continue
                raise Unwatchable(f"it depends on {step.name}") from None
            except (KeyError, IndexError, TypeError):
                raise Unwatchable(f"it depends on {step.name}") from None
            if kind != "call":
                if isinstance(parent, nn.Module) and self._in_structure(parent, key):
                    continue
                self._step(kind, parent, key, value)
            if step.ends and (kind, key) != ("attribute", "_modules"):
                self._last(step.name, value)
            self._follow(value, step)

    def _absence(self, parent: Any, key: str) -> str:
        """How to watch that ``parent.key`` stays absent: in its dict, if nothing else can provide it.

        A class is code, and the tables of a module belong to ``Structure``.
        """
        cls = type(parent)
        static = inspect.getattr_static(cls, key, _ABSENT) is _ABSENT
        simple = id(parent) in self.members or not hasattr(cls, "__getattr__")
        own = type(getattr(parent, "__dict__", None)) is dict
        return "absent" if static and simple and own else "attribute"

    def _key(self, name: str) -> object:
        """The value of a key that is an expression itself, watched like any other."""
        ((scope, root), source), *_ = sources_of.__wrapped__((name,)).items()
        self.follow(scope, root, source)
        _, *steps = steps_of(name)
        value: Any = (self.frame.values if scope == "L" else self.frame.namespace)[root]
        try:
            for kind, key in steps:
                value = _look_up(kind, self._key(key.name) if isinstance(key, Computed) else key, value)
        except (AttributeError, KeyError, IndexError, TypeError):
            raise Unwatchable(f"it depends on {name}") from None
        return value

    def _in_structure(self, module: nn.Module, key: object) -> bool:
        """Whether ``Structure`` covers ``module.key``: table, flag, hook dict, parameter or buffer."""
        if key == "training":
            self.flags[id(module)] = module.__dict__
        if key in _STRUCTURE:
            return key != "_modules"
        return id(module) in self.members and (key in module._parameters or key in module._buffers)

    def rest(self, step: str, holder: Any, key: Any, value: object) -> None:
        """Watches what the frame reads or writes back after its graph."""
        if id(holder) in self.covered:
            return
        if step == "size":
            self.result.sizes.append((holder, value))  # type: ignore[arg-type]
        else:
            self._step(step, holder, key, value)

    def _free(self, name: str) -> bool:
        return name in self.frame.code.co_freevars

    def _last(self, name: str, value: object) -> None:
        if isinstance(value, torch.Tensor):
            raise Unwatchable(
                f"it depends on the tensor {name}, which is neither argument, parameter nor buffer"
            )
        if isinstance(value, (list, dict, set)):
            self.result.sizes.append((value, len(value)))

    def _step(self, kind: str, parent: Any, key: Any, value: object) -> None:
        if isinstance(value, nn.Module) and id(value) in self.members and _is_structure(parent):
            return
        if _is_fixed(parent, key, value):
            if isinstance(value, nn.Module):  # in a tuple, say
                self._adopt(value)
            return
        mark = (id(parent), kind, key)
        if mark not in self.seen:
            self.seen.add(mark)
            self.result.add(kind, parent, key, value)
            if isinstance(value, nn.Module):
                self._adopt(value)


def _nth_key(table: dict[Any, Any], place: int) -> object:
    return next(islice(dict.keys(table), place, None), _ABSENT)


def _look_up(kind: str, key: Any, parent: Any) -> Any:
    if kind == "key":
        if not isinstance(parent, dict) or len(parent) <= key:
            raise KeyError(key)
        return _nth_key(parent, key)
    if kind == "call":
        return _BUILTINS[key](parent)  # KeyError for dict, list, ...: a fresh copy cannot be watched
    return getattr(parent, str(key)) if kind == "attribute" else parent[key]


def _is_structure(parent: Any) -> bool:
    """Whether ``parent`` is a module or a ``_modules`` dict, whose slots ``Structure`` covers."""
    return isinstance(parent, nn.Module) or (isinstance(parent, dict) and all(map(_is_slot, parent.values())))


def _is_slot(value: object) -> bool:
    return value is None or isinstance(value, nn.Module)


def _is_fixed(parent: Any, key: Any, value: object) -> bool:
    """Whether ``parent``'s ``key`` is frozen by contract: code, torch's own modules, items of a tuple."""
    if isinstance(parent, (tuple, str)) or isinstance(value, ModuleType) or _is_namespace(value):
        return True
    if isinstance(parent, nn.Module) and (
        key == "_modules" or type(parent).__module__.startswith("torch.nn.")
    ):
        return True
    if isinstance(value, MethodType) or (
        isinstance(parent, _FUNCTIONS) and not isinstance(parent, ModuleType)
    ):
        return True
    if isinstance(value, _FUNCTIONS) and (isinstance(parent, ModuleType) or _is_namespace(parent)):
        return True
    return isinstance(parent, ModuleType) and parent.__name__.split(".", 1)[0] == "torch"


def _is_namespace(parent: Any) -> bool:
    return isinstance(parent, dict) and "__name__" in parent and "__doc__" in parent

"""Source expressions of guards, such as ``L['self'].cfg['k']``, taken apart."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

__all__ = ["Computed", "Source", "Unwatchable", "sources_of", "steps_of"]

#: Ways of writing ``x.a`` and ``x[k]`` in a guard's source that some versions of torch prefer.
_ACCESSORS: dict[str | None, str] = {
    "object.__getattribute__": "attribute",
    "getattr": "attribute",
    "hasattr": "presence",
    "dict.__getitem__": "item",
    "list.__getitem__": "item",
    "tuple.__getitem__": "item",
}


#: A name with attributes and plain keys behind it, as nearly all are, and its steps.
_PLAIN = re.compile(r"([LG])\['(\w+)'\]((?:\.[^\W\d]\w*|\['[^'\\]*'\]|\[(?:0|[1-9][0-9]*)\])*)")
_STEP = re.compile(r"\.(\w+)|\['([^'\\]*)'\]|\[([0-9]+)\]")


class Unwatchable(Exception):
    """A guard that no learned call can respect; the message says which."""


@dataclass(frozen=True)
class Computed:
    """A key of an item that a guard's source computes."""

    name: str


def _no_sources() -> dict[tuple[str, Any], Source]:
    return {}


@dataclass(eq=False)
class Source:
    """One step that guards have in common, and how they go on.

    Attributes:
        name: of the first guard that takes it.
        ends: whether a guard ends here.
        steps: the next ones, by kind and key.
    """

    name: str
    ends: bool = field(default=False)
    steps: dict[tuple[str, Any], Source] = field(default_factory=_no_sources)


def _key(source: ast.expr) -> Any:
    return source.value if isinstance(source, ast.Constant) else Computed(ast.unparse(source))


def _call_of(node: ast.expr, name: str) -> ast.expr | None:
    """The argument of a call of the function ``name`` with one argument."""
    if isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords:
        return node.args[0] if _name(node.func) == name else None
    return None


def _name(node: ast.expr) -> str | None:
    """``a`` or ``a.b``."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return f"{node.value.id}.{node.attr}"
    return None


def _keys_of(node: ast.expr) -> ast.expr | None:
    """``x`` of ``list(dict.keys(x))``."""
    keys = _call_of(node, "list")
    return None if keys is None else _call_of(keys, "dict.keys")


@lru_cache(maxsize=1 << 15)
def steps_of(name: str) -> tuple[tuple[str, Any], ...]:
    """``L['self'].cfg['k']`` as (("L", "self"), ("attribute", "cfg"), ("item", "k")).

    Instances of one architecture have the same guards, some 2,000 for a ResNet-50.

    Raises:
        Unwatchable: not a chain of attributes and items that starts at a local or global name.
    """
    plain = _PLAIN.fullmatch(name)
    return _parsed(name) if plain is None else _plain_steps(plain)


def _plain_steps(match: re.Match[str]) -> tuple[tuple[str, Any], ...]:
    scope, root, rest = match.groups()
    found: list[tuple[str, Any]] = [(scope, root)]
    for attribute, key, index in _STEP.findall(rest):
        if attribute:
            found.append(("attribute", attribute))
        else:
            found.append(("item", int(index) if index else key))
    return tuple(found)


def _parsed(name: str) -> tuple[tuple[str, Any], ...]:
    try:
        node: ast.expr = ast.parse(name, mode="eval").body
    except SyntaxError:
        raise Unwatchable(f"it depends on {name}") from None
    steps: list[tuple[str, Any]] = []
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Attribute):
            steps.append(("attribute", node.attr))
            node = node.value
        elif isinstance(node, ast.Subscript):
            table = _keys_of(node.value)
            steps.append(("item" if table is None else "key", _key(node.slice)))
            node = node.value if table is None else table
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) == 1:
            steps.append(("call", node.func.id))
            node = node.args[0]
        elif isinstance(node, ast.Call) and len(node.args) == 2 and _name(node.func) in _ACCESSORS:
            steps.append((_ACCESSORS[_name(node.func)], _key(node.args[1])))
            node = node.args[0]
        else:
            raise Unwatchable(f"it depends on {name}")
    if node.id not in ("L", "G") or not steps or steps[-1][0] != "item":
        raise Unwatchable(f"it depends on {name}")
    steps.reverse()
    return ((node.id, steps[0][1]), *steps[1:])


@lru_cache(maxsize=32)
def sources_of(guards: tuple[str, ...]) -> dict[tuple[str, Any], Source]:
    """All steps of some guards by (scope, name) of where they start; each shared step is there once.

    Raises:
        Unwatchable: one that :func:`steps_of` does not understand.
    """
    found: dict[tuple[str, Any], Source] = {}
    for name in guards:
        if not name:
            continue
        here = found
        for step in steps_of(name):
            source = here.setdefault(step, Source(name))
            here = source.steps
        source.ends = True
    return found

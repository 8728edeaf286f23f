"""Source expressions of guards, such as ``L['self'].cfg['k']``, taken apart."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import Any

__all__ = ["Computed", "Unwatchable", "steps_of"]

#: Ways of writing ``x.a`` and ``x[k]`` in a guard's source that some versions of torch prefer.
_ACCESSORS = {
    "object.__getattribute__": "attribute",
    "getattr": "attribute",
    "dict.__getitem__": "item",
    "list.__getitem__": "item",
    "tuple.__getitem__": "item",
}
_KEYS = re.compile(r"list\(dict\.keys\((.*)\)\)")


class Unwatchable(Exception):
    """A guard that no learned call can respect; the message says which."""


@dataclass(frozen=True)
class Computed:
    """A key of an item that a guard's source computes."""

    name: str


def _key(source: ast.expr) -> Any:
    return source.value if isinstance(source, ast.Constant) else Computed(ast.unparse(source))


def steps_of(name: str) -> list[tuple[str, Any]]:
    """``L['self'].cfg['k']`` as [("L", "self"), ("attribute", "cfg"), ("item", "k")]."""
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
            keys = _KEYS.fullmatch(ast.unparse(node.value))
            steps.append(("item" if keys is None else "key", _key(node.slice)))
            node = node.value if keys is None else ast.parse(keys[1], mode="eval").body
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) == 1:
            steps.append(("call", node.func.id))
            node = node.args[0]
        elif isinstance(node, ast.Call) and len(node.args) == 2 and ast.unparse(node.func) in _ACCESSORS:
            steps.append((_ACCESSORS[ast.unparse(node.func)], _key(node.args[1])))
            node = node.args[0]
        else:
            raise Unwatchable(f"it depends on {name}")
    if node.id not in ("L", "G") or not steps or steps[-1][0] != "item":
        raise Unwatchable(f"it depends on {name}")
    steps.reverse()
    return [(node.id, steps[0][1]), *steps[1:]]

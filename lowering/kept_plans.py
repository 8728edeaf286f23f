"""Plans on disk: a later process with the same program, sources, versions and device skips lowering.

What is kept is the pickled recipe with the names of Inductor's code.
"""

from __future__ import annotations

import importlib
import io
import logging
import operator
import pickle
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch.fx import GraphModule

from torch_mux import compat

from . import kept
from .graphs import call_nodes
from .program import Program
from .recipe import PlanRecipe

__all__ = ["load", "name_of", "operator_of", "save"]

log = logging.getLogger(__name__)

_FOLDER = "plans"


def name_of(program: Program) -> str | None:
    """The name of the program's plan on disk: a digest of all that decides about it.

    None for a graph with operators of higher order: what they call, a kernel of the user's own for example,
    is known by a number of this process.
    """
    if not all(
        isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem
        for node in call_nodes(program.graph.graph)
    ):
        return None
    model = kept.model_of(program.device)
    return kept.digest_of(program.fingerprint, model, compat.tf32_allowed(), compat.surroundings())


def operator_of(name: str, overload: str) -> Any:
    """The operator of a schema."""
    namespace, _, packet = name.partition("::")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


class _Code:
    """A graph as a function of its own.

    ``torch.fx`` would trace it to make a module of it again, and while anybody traces, calls of modules in
    all threads of the process go through the tracer.
    """

    def __init__(self, source: str, names: dict[str, Any], attributes: dict[str, Any]) -> None:
        scope = dict(names)
        exec(compile(source, "<a plan on disk>", "exec"), scope)
        self._forward: Callable[..., Any] = scope["forward"]
        self._self = SimpleNamespace()
        for target, value in attributes.items():
            *path, last = target.split(".")
            place = self._self
            for name in path:
                place.__dict__.setdefault(name, SimpleNamespace())
                place = getattr(place, name)
            setattr(place, last, value)

    def __call__(self, *arguments: Any) -> Any:
        return self._forward(self._self, *arguments)


class _Pickler(pickle.Pickler):
    """Names operators and modules, which do not pickle, and keeps of a prepare graph what runs."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch._ops.OpOverload):
            return operator_of, (value._schema.name, value._overloadname)
        if isinstance(value, ModuleType):
            return importlib.import_module, (value.__name__,)
        if isinstance(value, GraphModule):
            code = value.graph.python_code("self")
            targets = [str(node.target) for node in value.graph.nodes if node.op == "get_attr"]
            return _Code, (code.src, code.globals, {t: operator.attrgetter(t)(value) for t in targets})
        return NotImplemented


def save(name: str, recipe: PlanRecipe, keys: tuple[str, ...]) -> None:
    """Keeps a recipe, with the name of Inductor's code for each of its steps."""
    try:
        buffer = io.BytesIO()
        _Pickler(buffer, protocol=5).dump((recipe, keys))
        kept.write(_FOLDER, name, buffer.getvalue())
    except Exception as error:  # a full disk, a folder of somebody else, a value that does not pickle
        log.info("the plan was not kept on disk: %s", repr(error))


def load(name: str) -> tuple[PlanRecipe, tuple[str, ...]] | None:
    """The recipe of that name and the names of its steps' code, or None."""
    try:
        payload = kept.read(_FOLDER, name)
        if payload is None:
            return None
        found: tuple[PlanRecipe, tuple[str, ...]] = pickle.loads(payload)
    except kept.Damaged:
        log.info("a plan on disk is damaged and is made again")
        return None
    except Exception as error:  # written by sources that this process knows nothing of
        log.info("a plan on disk cannot be read and is made again: %s", repr(error))
        return None
    return found

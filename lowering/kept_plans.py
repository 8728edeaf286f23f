"""Plans on disk: a later process with the same program, sources, versions and device skips lowering.

A file is a SHA-256 digest and the pickled recipe with the names of Inductor's code. It is written beside its
place and renamed, so readers never see a part of it; what does not match its digest counts as absent.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import io
import logging
import operator
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch.fx import GraphModule

from torch_mux import compat

from .graphs import call_nodes
from .program import Program
from .recipe import PlanRecipe

__all__ = ["load", "name_of", "save"]

log = logging.getLogger(__name__)

_DIGEST = hashlib.sha256().digest_size
_SOURCES = ("*.py", "*.json", "*.cpp", "*.h")


@functools.cache
def _sources() -> str:
    """Digest of lowering's own sources and of ``torch_mux.compat``."""
    found = hashlib.sha256()
    for folder in (Path(__file__).parent, Path(compat.__file__).parent):
        for path in sorted(path for pattern in _SOURCES for path in folder.rglob(pattern)):
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


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
    device, gpu = program.device, None
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        gpu = (found.name, found.major, found.minor, found.multi_processor_count)
    parts = (program.fingerprint, str(device), gpu, compat.tf32_allowed(), compat.surroundings(), _sources())
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _operator(name: str, overload: str) -> Any:
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
            return _operator, (value._schema.name, value._overloadname)
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
        payload = buffer.getvalue()
        folder = compat.cache_folder("plans")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(hashlib.sha256(payload).digest() + payload)
        os.replace(file.name, folder / name)
    except Exception as error:  # a full disk, a folder of somebody else, a value that does not pickle
        log.info("the plan was not kept on disk: %s", repr(error))


def load(name: str) -> tuple[PlanRecipe, tuple[str, ...]] | None:
    """The recipe of that name and the names of its steps' code, or None."""
    try:
        whole = (compat.cache_folder("plans") / name).read_bytes()
    except OSError:
        return None
    digest, payload = whole[:_DIGEST], whole[_DIGEST:]
    if hashlib.sha256(payload).digest() != digest:
        log.info("a plan on disk is damaged and is made again")
        return None
    try:
        found: tuple[PlanRecipe, tuple[str, ...]] = pickle.loads(payload)
    except Exception as error:  # written by sources that this process knows nothing of
        log.info("a plan on disk cannot be read and is made again: %s", repr(error))
        return None
    return found

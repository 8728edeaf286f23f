"""Inductor's code for a graph, named by its key in Inductor's own cache and found again without the graph.

Deriving that key takes the traced graph, and tracing takes longer than everything else in a warm start.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import re
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import torch
from torch._dynamo.utils import counters
from torch._guards import TracingContext, tracing
from torch._inductor import config
from torch._inductor.codecache import FxGraphCache, code_hash
from torch._inductor.output_code import CompiledFxGraphConstants
from torch._inductor.triton_bundler import TritonBundler
from torch._inductor.utils import BoxedBool
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode

from . import source_keys

__all__ = ["inductor_key", "inductor_load", "lean", "surroundings"]

#: Where the imports at the top of generated code have ended; kernels follow, some as text with imports in it.
_TOP: Final = "\nasync_compile = AsyncCompile()\n"
_IMPORT: Final = re.compile(r"^from torch\._inductor\.[\w.]+ import (\w+)(?: as (\w+))?$", re.MULTILINE)
_OPERATORS: Final = re.compile(r"\btorch\.ops\.(\w+)")
#: Namespaces of operators that are there without Inductor.
_KNOWN: Final = frozenset({"aten", "inductor", "_quantized", "mux"})


def _told(value: Any) -> object:
    """A setting in words; a pass of the user's own by what it says of itself, or else as nobody else's."""
    uuid = getattr(value, "uuid", None)
    return repr(uuid()) if callable(uuid) else repr(value)


def surroundings() -> str:
    """Digest of all that decides about Inductor's code beside the graph: versions, device, configuration."""
    parts = (
        source_keys.installed(),
        platform.python_version(),
        platform.machine(),
        torch.backends.cpu.get_cpu_capability(),
        torch.version.cuda,
        repr(sorted(config.save_config_portable(ignore_private_configs=False).items())),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch._C._get_deterministic_fill_uninitialized_memory(),
        torch.get_num_threads(),
        [_told(getattr(config, name)) for name in sorted(config.get_config_copy()) if "custom" in name],
        torch.get_default_dtype(),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def inductor_key(artifact: object) -> str | None:
    """Under which name Inductor's cache holds what ``inductor_compile`` returned; None where it does not."""
    key = getattr(artifact, "_fx_graph_cache_key", None)
    return key if isinstance(key, str) and config.fx_graph_cache and not config.force_disable_caches else None


def inductor_load(key: str, fakes: Sequence[Any], mode: FakeTensorMode) -> Callable[[list[Any]], Any] | None:
    """The code of that name for arguments like ``fakes``, or None where the cache has lost it."""
    if not config.fx_graph_cache or config.force_disable_caches:
        return None
    with torch.no_grad(), tracing(TracingContext(mode)), V.set_fake_mode(mode):
        code = _entry(key, fakes, mode)
        if code is None:
            counters["inductor"]["fxgraph_cache_miss"] += 1
            return None
        counters["inductor"]["fxgraph_cache_hit"] += 1
        constants = CompiledFxGraphConstants()
        _load(code, constants)
        code._fx_graph_cache_key = key
        kwargs: Any = {"cudagraphs": BoxedBool(config.triton.cudagraphs), "is_backward": False}
        code.post_compile(list(fakes), constants, kwargs)
    return _Loaded(code)


class _Loaded:
    """Calls Inductor's code; what its own object does besides needs modules of the compiler."""

    def __init__(self, code: Any) -> None:
        self._code = code

    def __call__(self, arguments: list[Any]) -> Any:
        return self._code.current_callable(arguments)


def _entry(key: str, fakes: Sequence[Any], mode: FakeTensorMode) -> Any:
    """What Inductor's cache on this disk holds under that name for sizes like these, or None."""
    environment: Any = mode.shape_env
    hints = [symbol.node.hint for symbol in FxGraphCache._filter_backed_symints(fakes)]
    code: Any = FxGraphCache.find_guarded_entry(
        key, True, None, environment.evaluate_guards_expression, hints
    )[0]
    libraries = getattr(code, "extern_libs_key", None)  # from torch 2.13 on
    if libraries is not None:
        from torch.utils import _triton

        own: Any = _triton
        if own._extern_libs_key(own.triton_backend()) != libraries:
            return None
    return code


def _load(code: Any, constants: CompiledFxGraphConstants) -> None:
    """Makes an entry callable, as Inductor's cache does, without Inductor's compiler.

    ``FxGraphCache.load_with_key`` and the top of all generated code import the compiler, which takes as long
    as all the rest of a warm start's loading; and where its kernels come along, no pool of compiling
    processes is needed.
    """
    bundle = code._triton_bundle
    if bundle is not None:
        TritonBundler.read_and_emit(bundle)
    source = lean(code.source_code)
    if source != code.source_code:
        code.source_code, code.cache_key = source, code_hash(source)
    complete = bundle is not None and bool(bundle.static_autotuners)
    threads = cast(Any, config).patch(compile_threads=1) if complete else contextlib.nullcontext()
    with threads:
        code.after_deserialization(constants)
    if hasattr(code, "_set_compile_context_for_autotune_cache"):
        code._set_compile_context_for_autotune_cache()


def lean(source: str) -> str:
    """Generated code without those imports of Inductor at its top whose names nothing in it uses.

    Lines stay where they are. Code that calls operators which Inductor's modules may have to register stays
    as it is.
    """
    if not _KNOWN.issuperset(_OPERATORS.findall(source)):
        return source
    top, mark, rest = source.partition(_TOP)

    def kept(line: re.Match[str]) -> str:
        name = re.compile(rf"\b{line[2] or line[1]}\b")
        return line[0] if len(name.findall(source)) > len(name.findall(line[0])) else ""

    return _IMPORT.sub(kept, top) + mark + rest if mark else source

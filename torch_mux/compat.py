"""The only file that names private parts of torch; every function works on torch 2.11 to 2.13."""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._C._dynamo.eval_frame as _eval_frame
import torch._dynamo.config as _dynamo_config
import torch.utils._contextlib
from torch._C._dynamo.guards import GlobalStateGuard, TensorGuards
from torch._dynamo import convert_frame as _convert_frame
from torch._dynamo import eval_frame as _dynamo_eval_frame
from torch._dynamo import external_utils as _external_utils
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.guards import DeletedGuardManagerWrapper
from torch._dynamo.types import ConvertFrameReturn, GuardedCode, wrap_guarded_code

from torch_mux.compat_inductor import *  # noqa: F403

__all__ = [
    "active_modes",
    "cache_entries",
    "caller_files",
    "compiled_backend",
    "install_first_call_guard",
    "original_module",
    "raise_recompile_limits",
    "state_check",
    "tensor_check",
]

RECOMPILE_LIMIT = 256
ACCUMULATED_RECOMPILE_LIMIT = 4096

_guarded: list[Callable[..., Any]] = []
_install_lock = threading.Lock()


def raise_recompile_limits(
    limit: int = RECOMPILE_LIMIT, accumulated: int = ACCUMULATED_RECOMPILE_LIMIT
) -> None:
    """Raise Dynamo's recompile limits for the whole process, other backends included.

    Beyond ``recompile_limit`` (8) graphs of one code object Dynamo goes silently eager: nine widths of one
    class, or nine different ``nn.Sequential`` models. What is raised is the *default*: an assignment would
    hold in the assigning thread alone on torch 2.13, and a limit that the user assigned still wins.
    """
    entries: dict[str, Any] = _dynamo_config._config  # type: ignore[attr-defined]
    for name, value in (("recompile_limit", limit), ("accumulated_recompile_limit", accumulated)):
        entries[name].default = max(entries[name].default, value)


def cache_entries(code: types.CodeType) -> list[Any]:
    """Dynamo's live cache entries of ``code``, of all backends, most recently used first."""
    return [entry for entry in _entries(code) if entry.code is not None and not _is_duplicate(entry)]


def install_first_call_guard(backend: Callable[..., Any]) -> None:
    """Make concurrent first calls of models compiled with ``backend`` compile once, and safely.

    Dynamo looks a frame up in its cache, and compiles on a miss, with nothing that ties the two together: n
    threads that call one architecture for the first time compile it n times, beyond the recompile limit
    Dynamo goes silently eager, and on torch 2.11 the process's first compile from two threads crashes. A
    string backend has no hook before that, so Dynamo's frame callback itself is wrapped, for models of
    guarded backends alone: a miss takes Dynamo's compile lock and then looks again. Idempotent.
    """
    with _install_lock:
        if backend not in _guarded:
            _guarded.append(backend)
        original = _convert_frame.CatchErrorsWrapper.__call__
        if getattr(original, "guards_first_calls", False):
            return

        def guarded_call(self: Any, frame: Any, cache_entry: Any, frame_state: Any) -> ConvertFrameReturn:
            innermost = _innermost(self)
            if getattr(innermost, "compiler_fn", innermost) not in _guarded:
                return original(self, frame, cache_entry, frame_state)
            with _convert_frame.compile_lock:
                found = _find_entry(frame, innermost)
                if found is not None:
                    return _run_entry(frame.f_code, found)
                return original(self, frame, _first_entry(frame.f_code, cache_entry), frame_state)

        # Dynamo looks for the caller of a frame by skipping the stack's frames of convert_frame.py; it must
        # skip this one too, or torch.compiler.disable(recursive=False) has no effect.
        where = f"{_convert_frame.__file__} (first-call guard of {__name__})"
        guarded_call.__code__ = guarded_call.__code__.replace(co_filename=where)
        guarded_call.guards_first_calls = True  # type: ignore[attr-defined]
        _convert_frame.CatchErrorsWrapper.__call__ = guarded_call  # type: ignore[method-assign]


class _DuplicateGuards(DeletedGuardManagerWrapper):
    """Guards of an entry that exists only to run another entry's code once: they never hold."""

    def __init__(self) -> None:
        super().__init__("another thread compiled this frame first")
        self.root = None  # type: ignore[assignment]
        # Dynamo's recompile limit counts the entries whose id-matched objects are those of the frame: no
        # local is called "", so this entry is never counted.
        self.anchor = _Anchor()
        self.id_matched_objs = {"": weakref.ref(self.anchor)}


class _Anchor:
    """A thing that weak references can point at."""


def _innermost(callback: Any) -> Any:
    while hasattr(callback, "_torchdynamo_orig_backend"):
        callback = callback._torchdynamo_orig_backend
    return callback


def _entries(code: types.CodeType) -> list[Any]:
    return list(_eval_frame._debug_get_cache_entry_list(code))


def _is_duplicate(entry: Any) -> bool:
    return isinstance(entry.guard_manager, _DuplicateGuards)


def _region() -> int:
    """The isolate_recompiles region of the calling thread (torch 2.13), else the one that there is."""
    current = getattr(_eval_frame, "get_eval_frame_isolate_recompiles_id", None)
    return -1 if current is None else int(current())


def _find_entry(frame: Any, backend: Any) -> Any | None:
    """The entry that Dynamo's look-up would find for ``frame`` now."""
    region = _region()
    for entry in cache_entries(frame.f_code):
        same = entry.backend is backend or (
            type(entry.backend) is type(backend) and bool(entry.backend == backend)
        )
        if not same or getattr(entry, "isolate_recompiles_id", region) != region:
            continue
        if entry.guard_manager.check(frame.f_locals):
            return entry
    return None


def _first_entry(code: types.CodeType, cache_entry: Any) -> Any:
    """The head of the entry list as it is now: another thread may have added to it meanwhile."""
    if cache_entry is not None and not hasattr(cache_entry, "next"):
        return cache_entry
    entries = _entries(code)
    return entries[0] if entries else None


def _run_entry(code: types.CodeType, entry: Any) -> ConvertFrameReturn:
    """Have Dynamo run ``entry`` for the frame it asked about.

    The only way to say so is to hand the code over as if it had just been compiled. That adds an entry
    whose guards never hold; it is invalidated when Dynamo drops the answer, after the frame has run.
    """
    label = f"Torch-Compiled Region: {entry.compile_id}"
    guards = _DuplicateGuards()
    answer = wrap_guarded_code(GuardedCode(entry.code, guards, entry.compile_id, label))  # type: ignore[arg-type]
    weakref.finalize(answer, _invalidate, guards).atexit = False
    return answer


def _invalidate(guards: _DuplicateGuards) -> None:
    """Empty a duplicate's entry; Dynamo then keeps it, inert, at the end of its list."""
    # Both are set by Dynamo once the entry is complete, and unset when the entry is destroyed.
    extra_state, entry = guards.extra_state, guards.cache_entry
    if extra_state is not None and entry is not None:
        extra_state.invalidate(entry, guards)


def compiled_backend(model: Any) -> Any | None:
    """The Dynamo backend of a model, or None where ``torch.compile`` did not make it."""
    context = getattr(model, "dynamo_ctx", None)
    if context is None:
        wrapper = getattr(model, "_compiled_call_impl", None) if isinstance(model, torch.nn.Module) else model
        config = getattr(wrapper, "get_compiler_config", None)
        cells = getattr(config, "__closure__", None) or ()
        context = next(
            (cell.cell_contents for cell in cells if hasattr(cell.cell_contents, "callback")), None
        )
    if context is None:
        return None
    innermost = _innermost(context.callback)
    return getattr(innermost, "compiler_fn", innermost)


def original_module(model: Any) -> torch.nn.Module | None:
    """The module inside a compiled model, or None for a compiled function."""
    if isinstance(model, OptimizedModule):
        module: torch.nn.Module = model._orig_mod
        return module
    return model if isinstance(model, torch.nn.Module) else None


def state_check() -> Callable[[], bool]:
    """A check that grad mode, autocast, default dtype, determinism, TF32 and threads are as they are now."""
    check: Callable[[], bool] = GlobalStateGuard().check
    return check


def tensor_check(tensors: Sequence[torch.Tensor]) -> Callable[..., bool]:
    """A check that tensors have the type, shape, strides, dtype, device, dispatch keys and ``requires_grad``
    that ``tensors`` have now; about 200 ns a tensor. It keeps none of them alive."""
    sizes: list[Any] = [list(tensor.shape) for tensor in tensors]
    strides: list[Any] = [list(tensor.stride()) for tensor in tensors]
    check: Callable[..., bool] = TensorGuards(
        *tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides
    ).check
    return check


def active_modes() -> int:
    """How many torch function and dispatch modes are active in this thread."""
    return int(torch._C._len_torch_function_stack()) + int(torch._C._len_torch_dispatch_stack())


def caller_files() -> frozenset[str]:
    """Source files of torch that may stand between a call of a compiled model and its rewritten frame."""
    modules = (torch.nn.modules.module, _dynamo_eval_frame, _external_utils, torch.utils._contextlib)
    return frozenset(str(module.__file__) for module in modules)

"""Concurrent first calls: Dynamo's look-up and its compile tied together for chosen backends."""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch._C._dynamo.eval_frame as _eval_frame
import torch._dynamo.config as _dynamo_config
from torch._dynamo import convert_frame as _convert_frame
from torch._dynamo.guards import DeletedGuardManagerWrapper
from torch._dynamo.types import ConvertFrameReturn, GuardedCode, wrap_guarded_code

from .collector import paused_collector
from .dynamo import innermost

__all__ = [
    "Eager",
    "cache_entries",
    "install_first_call_guard",
]

Eager = Callable[[types.CodeType, object, bool], object]
"""Told of a frame that Dynamo leaves to eager PyTorch: code, first argument, whether a limit is why."""

_TORCH = str(torch.__path__[0])
_guarded: list[Callable[..., Any]] = []
_told: dict[int, Eager] = {}
_install_lock = threading.Lock()


def cache_entries(code: types.CodeType) -> list[Any]:
    """Dynamo's live cache entries of ``code``, of all backends, most recently used first."""
    return [entry for entry in _entries(code) if entry.code is not None and not _is_duplicate(entry)]


def install_first_call_guard(backend: Callable[..., Any], eager: Eager | None = None) -> None:
    """Make concurrent first calls of models compiled with ``backend`` compile once, and safely.

    Dynamo looks a frame up in its cache, and compiles on a miss, with nothing that ties the two together: n
    threads that call one architecture for the first time compile it n times, beyond the recompile limit
    Dynamo goes silently eager, and on torch 2.11 the process's first compile from two threads crashes. A
    string backend has no hook before that, so Dynamo's frame callback itself is wrapped, for models of
    guarded backends alone: a miss takes Dynamo's compile lock and then looks again. What is compiled is
    also guarded on the hooks of submodules, so that one added later is honoured. Idempotent.

    Args:
        backend: whose models to guard.
        eager: told of frames that Dynamo leaves to eager PyTorch because a recompile limit is reached, or
            because an error was suppressed. Dynamo itself logs the one and may be silent about the other.
    """
    with _install_lock:
        if backend not in _guarded:
            _guarded.append(backend)
        if eager is not None:
            _told[id(backend)] = eager
        original = _convert_frame.CatchErrorsWrapper.__call__
        if getattr(original, "guards_first_calls", False):
            return

        def guarded_call(self: Any, frame: Any, cache_entry: Any, frame_state: Any) -> ConvertFrameReturn:
            own = innermost(self)
            backend = getattr(own, "compiler_fn", own)
            if backend not in _guarded:
                return original(self, frame, cache_entry, frame_state)
            with _convert_frame.compile_lock:
                found = _find_entry(frame, own)
                if found is not None:
                    return _run_entry(frame.f_code, found)
                # By default Dynamo reuses code across modules that differ in their submodules' hooks.
                with paused_collector(), _dynamo_config.patch(skip_nnmodule_hook_guards=False):
                    answer: ConvertFrameReturn = original(
                        self, frame, _first_entry(frame.f_code, cache_entry), frame_state
                    )
            _tell(backend, frame, answer)
            return answer

        # Dynamo looks for the caller of a frame by skipping the stack's frames of convert_frame.py; it must
        # skip this one too, or torch.compiler.disable(recursive=False) has no effect.
        where = f"{_convert_frame.__file__} (first-call guard of {__name__})"
        guarded_call.__code__ = guarded_call.__code__.replace(co_filename=where)
        guarded_call.guards_first_calls = True  # type: ignore[attr-defined]
        _convert_frame.CatchErrorsWrapper.__call__ = guarded_call  # type: ignore[method-assign]


def _tell(backend: Callable[..., Any], frame: Any, answer: ConvertFrameReturn) -> None:
    """Report a frame that was given up. Frames that Dynamo never looks into are not."""
    eager, code = _told.get(id(backend)), frame.f_code
    if eager is None or answer.guarded_code is not None or code.co_filename.startswith(_TORCH):
        return
    limit = answer.frame_exec_strategy.cur_action == _eval_frame._FrameAction.RUN_ONLY
    reason = getattr(answer, "skip_reason", None)  # torch 2.11 does not say
    if limit or ("suppressed" in reason if reason else _dynamo_config.suppress_errors):
        names = code.co_varnames[: code.co_argcount]
        eager(code, frame.f_locals.get(names[0]) if names else None, limit)


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

"""The process's one engine: made on first use, replaced by ``reset``, never shared with a forked child."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from torch_mux.errors import ClosedError, UnknownOption
from torch_mux.settings import Settings
from torch_mux.types import FallbackReason

if TYPE_CHECKING:
    from torch_mux.runtime.engine import Engine

__all__ = [
    "close",
    "configure",
    "engine",
    "epoch",
    "note",
    "notes",
    "on_reset",
    "peek",
    "replaced",
    "reset",
    "settings",
]

_NOTES = 512


class _State:
    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.settings = Settings()
        self.engine: Engine | None = None
        self.epoch = 1
        self.closed = False
        self.notes: dict[FallbackReason, int] = {}


_state = _State()
_on_reset: list[Callable[[], None]] = []


def engine() -> Engine:
    """The engine, made with the current settings where there is none.

    Raises:
        ClosedError: after ``close()`` and before ``reset()``.
    """
    found = _state.engine
    if found is not None and not _state.closed:
        return found
    with _state.lock:
        if _state.closed:
            raise ClosedError()
        if _state.engine is None:
            from torch_mux import compat
            from torch_mux.runtime.engine import Engine

            _state.engine = Engine(
                _state.settings,
                compile_lock=compat.compile_lock(),
                forecasts=compat.cache_folder("forecasts"),
            )
        return _state.engine


def peek() -> Engine | None:
    """The engine if there is one."""
    return _state.engine


def replaced(engine: object) -> bool:
    """Whether ``reset`` let go of this engine: what it refused or had not begun is to be asked for again."""
    return _state.engine is not engine and not _state.closed


def epoch() -> int:
    """A number that changes when learned routes of an earlier engine become invalid."""
    return _state.epoch


def settings() -> Settings:
    """The settings in force."""
    return _state.settings


def configure(changes: dict[str, Any]) -> Settings:
    """Applies already parsed settings to this process and its engine.

    Raises:
        UnknownOption: a name that is no setting.
    """
    valid = sorted(item.name for item in fields(Settings))
    for name in changes:
        if name not in valid:
            raise UnknownOption.near("setting", name, valid)
    with _state.lock:
        before, _state.settings = _state.settings, replace(_state.settings, **changes)
        if before.enabled != _state.settings.enabled:
            _state.epoch += 1
        if _state.engine is not None:
            _state.engine.configure(_state.settings)
        return _state.settings


def reset() -> None:
    """Forgets every program, instance, route, note and setting, and opens again after ``close``."""
    with _state.lock:
        found, _state.engine = _state.engine, None
        _state.settings = Settings()
        _state.epoch += 1
        _state.closed = False
        _state.notes = {}
    for function in _on_reset:
        function()
    if found is not None:
        found.close()


def close() -> None:
    """Finishes what is queued and stops every thread; calls then raise ``ClosedError`` until ``reset``."""
    with _state.lock:
        found = _state.engine
        _state.closed = True
        _state.epoch += 1
    for function in _on_reset:
        function()
    if found is not None:
        found.close()


def on_reset(function: Callable[[], None]) -> Callable[[], None]:
    """Has ``function`` called by ``reset`` and ``close``."""
    _on_reset.append(function)
    return function


def note(reason: FallbackReason) -> None:
    """Keeps a fall-back of the face for ``explain()``; equal ones are counted."""
    with _state.lock:
        if reason in _state.notes or len(_state.notes) < _NOTES:
            _state.notes[reason] = _state.notes.get(reason, 0) + 1


def notes() -> tuple[tuple[FallbackReason, int], ...]:
    """Every kept fall-back and how often it was seen."""
    with _state.lock:
        return tuple(_state.notes.items())


def _forked() -> None:
    _state.lock = threading.RLock()
    _state.engine = None
    _state.epoch += 1


os.register_at_fork(after_in_child=_forked)

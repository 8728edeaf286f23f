"""How long a computing thread keeps the interpreter's lock while others ask for it."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

__all__ = ["brisk"]


class _State:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.held = 0
        self.before = 0.0
        self.ours = 0.0


_state = _State()


@contextlib.contextmanager
def brisk(seconds: float) -> Iterator[None]:
    """Threads hand the interpreter over after ``seconds`` at most meanwhile; nested ones keep the first's.

    Python's own interval is 5 ms, and whoever serves asks for the interpreter several times a request: while
    one thread compiles, each of these costs as much. The interval is the process's. It is what it was once
    everybody has left, unless somebody else has set another one meanwhile.

    Args:
        seconds: 0 changes nothing, nor does more than the interval there is.
    """
    if not seconds:
        yield
        return
    with _state.lock:
        _state.held += 1
        if _state.held == 1:
            _state.before = _state.ours = sys.getswitchinterval()
            if seconds < _state.before:
                sys.setswitchinterval(seconds)
                _state.ours = sys.getswitchinterval()
    try:
        yield
    finally:
        with _state.lock:
            _state.held -= 1
            if not _state.held:
                _restore()


def _restore() -> None:
    if sys.getswitchinterval() == _state.ours != _state.before:
        sys.setswitchinterval(_state.before)


def _forked() -> None:
    if _state.held:
        _restore()
    _state.__init__()  # type: ignore[misc]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)

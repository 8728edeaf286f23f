"""The end of the process, at which nobody is left to read an error; and forks, which no thread survives."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from typing import Final, Protocol

__all__ = ["wait_if_leaving", "watch"]


class _Engine(Protocol):
    def close(self) -> None: ...

    def after_fork(self) -> None: ...


_begun: Final = threading.Event()
_engines: Final[weakref.WeakSet[_Engine]] = weakref.WeakSet()


def watch(engine: _Engine) -> None:
    """Has ``engine`` closed at the end of the process, and told in the child of a fork."""
    _engines.add(engine)


def wait_if_leaving() -> None:
    """Stops a daemon thread that the runtime refuses at the process's end, where it has a moment to live.

    Python ends such a thread without a word wherever it happens to be; an error would be printed instead.
    The caller holds no lock that the end of the process needs.
    """
    if _begun.is_set() and threading.current_thread().daemon:
        threading.Event().wait()


def _close_all() -> None:
    """The interpreter is about to end: only daemon threads are left besides the main thread."""
    _begun.set()
    for engine in list(_engines):
        engine.close()


def _forked() -> None:
    for engine in list(_engines):
        engine.after_fork()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)

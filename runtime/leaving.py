"""The end of the process, at which nobody is left to read an error."""

from __future__ import annotations

import threading

__all__ = ["begin", "wait_if_leaving"]

_begun = threading.Event()


def begin() -> None:
    """The interpreter is about to end: only daemon threads are left besides the main thread."""
    _begun.set()


def wait_if_leaving() -> None:
    """Stops a daemon thread that the runtime refuses at the process's end, where it has a moment to live.

    Python ends such a thread without a word wherever it happens to be; an error would be printed instead.
    The caller holds no lock that the end of the process needs.
    """
    if _begun.is_set() and threading.current_thread().daemon:
        threading.Event().wait()

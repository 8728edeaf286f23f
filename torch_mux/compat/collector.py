"""Python's cyclic garbage collector, held off while PyTorch traces."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["paused_collector"]

_lock = threading.Lock()
_state = {"held": 0, "enabled": False}


@contextmanager
def paused_collector() -> Iterator[None]:
    """No automatic collection in this process meanwhile; may be nested and entered from several threads.

    A trace makes millions of objects that live on, and each full collection walks them all again: a tenth of
    the time of a process's first trace. Seconds, once an architecture.
    """
    with _lock:
        if not _state["held"]:
            _state["enabled"] = gc.isenabled()
            gc.disable()
        _state["held"] += 1
    try:
        yield
    finally:
        with _lock:
            _state["held"] -= 1
            if not _state["held"] and _state["enabled"]:
                gc.enable()

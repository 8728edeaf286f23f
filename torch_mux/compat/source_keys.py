"""The hashes of torch's and Triton's own sources, made beside Dynamo's first trace.

Every look into Inductor's and Triton's compile caches begins with a hash of their source files. They keep it
for the life of the process but do not lock: in a warm start four threads read some thousand files at once.
"""

from __future__ import annotations

import os
import threading

__all__ = ["begin", "ready"]


def _hash() -> None:
    from torch._inductor.codecache import torch_key

    torch_key()
    try:
        from triton.runtime.cache import triton_key
    except ImportError:  # no Triton, or one that makes its key elsewhere and in its own time
        return
    triton_key()


_thread = threading.Thread(target=_hash, name="torch_mux-source-keys", daemon=True)
_once = threading.Lock()


def begin() -> None:
    """Starts hashing on a thread of its own; at once again if that is done or under way."""
    with _once:
        if _thread.ident is None:
            _thread.start()


def ready() -> None:
    """Returns when the hashes are there."""
    begin()
    _thread.join()


def _finish() -> None:
    if _thread.ident is not None:
        _thread.join()


if hasattr(os, "register_at_fork"):
    # From 2.13 on torch makes its hash under a lock, which nobody would release in a child.
    os.register_at_fork(before=_finish)

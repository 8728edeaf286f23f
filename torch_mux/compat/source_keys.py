"""What identifies the installed torch and Triton: quickly for our own caches, and ahead of need for Triton's.

Triton's compile cache begins every look with a hash of its sources, kept for the life of the process but made
by as many threads as ask first. One thread makes it beside Dynamo's first trace. Inductor's hash covers all
of torch's sources, takes longer than a plan takes to load, and is not needed where a plan is found on disk.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import threading
from pathlib import Path

import torch

__all__ = ["begin", "installed", "ready"]


def _hash() -> None:
    try:
        from triton.runtime.cache import triton_key
    except ImportError:  # no Triton, or one that makes its key elsewhere and in its own time
        return
    triton_key()


_thread = threading.Thread(target=_hash, name="torch_mux-source-keys", daemon=True)
_once = threading.Lock()


def begin() -> None:
    """Starts hashing Triton's sources on a thread of its own, where there is a GPU to compile for."""
    if not torch.cuda.is_available():
        return
    with _once:
        if _thread.ident is None:
            _thread.start()


def ready() -> None:
    """Returns when Triton's hash is there; in a child that was forked meanwhile whoever needs it makes it."""
    begin()
    if _thread.ident is not None:
        _thread.join()


def _stamps(folder: Path) -> str:
    """Digest of the names, sizes and times of all Python files below ``folder``."""
    found = hashlib.sha256()
    for place, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            if name.endswith(".py"):
                state = os.stat(os.path.join(place, name))
                found.update(f"{place}/{name} {state.st_size} {state.st_mtime_ns}\n".encode())
    return found.hexdigest()


@functools.cache
def installed() -> str:
    """Digest of the versions of torch and Triton and of the state of their files."""
    parts = [torch.__version__, torch.version.git_version, _stamps(Path(torch.__file__).parent)]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        parts.append(_stamps(Path(triton.origin).parent))
    return hashlib.sha256(repr(parts).encode()).hexdigest()

"""What identifies the installed torch and Triton: quickly for our own caches, and ahead of need for Triton's.

Triton's compile cache begins every look with a hash of its sources, kept for the life of the process but made
by as many threads as ask first, and so is the rest of what its first kernel needs. One thread makes it beside
Dynamo's first trace. Inductor's hash covers all
of torch's sources, takes longer than a plan takes to load, and is not needed where a plan is found on disk.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import logging
import os
import threading
from pathlib import Path
from typing import Final

import torch

from .switching import quick_switching

__all__ = ["begin", "installed", "ready"]

log = logging.getLogger(__name__)

#: Folders of an installation with thousands of files and no Python among them.
_WITHOUT: Final = frozenset({"__pycache__", "include", "share", "lib", "bin"})


def _prepare() -> None:
    with quick_switching():
        try:
            _triton()
        except (
            ImportError
        ):  # no Triton, or one that has these things elsewhere and makes them in its own time
            log.debug("Triton was not made ready ahead", exc_info=True)
        except Exception:  # whoever launches a kernel gets this error; here it only costs time
            log.info("Triton was not made ready ahead", exc_info=True)


def _triton() -> None:
    """What the first look of each thread for a kernel would do, each for itself; initialises no GPU."""
    from triton.runtime.cache import triton_key

    triton_key()
    triton = importlib.import_module("triton")
    _ = triton.runtime.driver.active  # starts processes to learn about the platform
    importlib.import_module("triton.experimental.gluon")  # asked for types by every first specialisation
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        major, minor = torch.cuda.get_device_capability()
        importlib.import_module("triton.backends.nvidia.compiler").get_ptxas_version(10 * major + minor)


_thread = threading.Thread(target=_prepare, name="torch_mux-source-keys", daemon=True)
_once = threading.Lock()


def begin() -> None:
    """Makes Triton ready on a thread of its own, where there is a GPU to compile for."""
    if not torch.cuda.is_available():
        return
    with _once:
        if _thread.ident is None:
            _thread.start()


def ready() -> None:
    """Returns when Triton is ready; in a child that was forked meanwhile whoever needs it makes it."""
    begin()
    if _thread.ident is not None:
        _thread.join()


def _stamps(folder: Path) -> str:
    """Digest of the names, sizes and times of all Python files below ``folder``."""
    found: list[tuple[str, int, int]] = []
    pending = [str(folder)]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.name.endswith(".py"):
                    state = entry.stat()
                    found.append((entry.path, state.st_size, state.st_mtime_ns))
                elif entry.name not in _WITHOUT and entry.is_dir():
                    pending.append(entry.path)
    return hashlib.sha256(repr(sorted(found)).encode()).hexdigest()


@functools.cache
def installed() -> str:
    """Digest of the versions of torch and Triton and of the state of their files."""
    parts = [torch.__version__, torch.version.git_version, _stamps(Path(torch.__file__).parent)]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        parts.append(_stamps(Path(triton.origin).parent))
    return hashlib.sha256(repr(parts).encode()).hexdigest()

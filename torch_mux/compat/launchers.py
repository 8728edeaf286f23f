"""Launchers that Triton compiles stay apart when several threads load them."""

from __future__ import annotations

import functools
import threading
from types import ModuleType
from typing import Any

__all__ = ["keep_launchers_apart"]

_lock = threading.Lock()


def keep_launchers_apart() -> None:
    """From now on each C module that Triton loads is an object of its own; idempotent, for the whole process.

    Every launcher is an extension module of one name. Loading one for the second time, CPython (single-phase
    initialisation, ``import_find_extension``) fills the namespace of whatever module has that name by then,
    which is another launcher: a thread that was about to read that one's ``launch`` gets the wrong function,
    and a kernel is launched with another's arguments. So loads take turns and their results are copied.
    """
    from triton.runtime import build

    load: Any = getattr(build, "_load_module_from_path", None)
    if load is None or hasattr(load, "__wrapped__"):
        return

    @functools.wraps(load)
    def apart(name: str, path: str) -> ModuleType:
        with _lock:
            own = ModuleType(name)
            own.__dict__.update(vars(load(name, path)))
            return own

    build._load_module_from_path = apart

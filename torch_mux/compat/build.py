"""Which of its two builds this package is; see ``docs/design/runtime.md``."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TypeVar

__all__ = ["caused", "compiled"]

_Error = TypeVar("_Error", bound=BaseException)


@cache
def compiled() -> bool:
    """Whether the runtime's hot modules were compiled by mypyc when the package was built."""
    found = find_spec("torch_mux.runtime.scheduler.policy")
    return found is not None and found.origin is not None and not found.origin.endswith(".py")


def caused(error: _Error, cause: BaseException) -> _Error:
    """``raise caused(error, cause)`` is ``raise error from cause``, of which mypyc leaves out the cause."""
    error.__cause__ = cause
    return error

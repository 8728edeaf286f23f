"""Which of its two builds this package is; see ``docs/design/runtime.md``."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

__all__ = ["compiled"]


@cache
def compiled() -> bool:
    """Whether the runtime's hot modules were compiled by mypyc when the package was built."""
    found = find_spec("torch_mux.runtime.scheduler.policy")
    return found is not None and found.origin is not None and not found.origin.endswith(".py")

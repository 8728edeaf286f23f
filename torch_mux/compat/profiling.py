"""Ranges in ``torch.profiler``, which cost nothing while no profiler runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch.profiler import record_function

__all__ = ["ranges"]

_NOTHING: AbstractContextManager[None] = nullcontext()


@contextmanager
def _nested(names: Iterable[str]) -> Iterator[None]:
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(record_function(name))
        yield


def ranges(names: Callable[[], Iterable[str]]) -> AbstractContextManager[None]:
    """Nested ranges of these names while a profiler records this thread; ``names`` is called only then."""
    return _nested(names()) if torch._C._autograd._profiler_enabled() else _NOTHING

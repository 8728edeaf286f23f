"""Running a call on another thread as if it ran on its caller's."""

from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from torch_mux import state

__all__ = ["Caller", "run"]

WORKERS = 32
T = TypeVar("T")
_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None


@dataclass(frozen=True, eq=False)
class Caller:
    """Everything of the calling thread that a model's answer depends on.

    Attributes:
        context: its context variables (the quota among them).
        grad, inference: its grad and inference mode.
        autocast: (device type, enabled, dtype) of every device type with an accelerator or a CPU.
        cache: whether autocast caches its casts.
        stream: its current CUDA stream, or None where CUDA was not used.
    """

    context: contextvars.Context
    grad: bool
    inference: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    cache: bool
    stream: torch.cuda.Stream | None

    @classmethod
    def here(cls) -> Caller:
        """The calling thread as it is now."""
        cuda = bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
        kinds = ("cpu", "cuda") if cuda else ("cpu",)
        return cls(
            context=contextvars.copy_context(),
            grad=torch.is_grad_enabled(),
            inference=torch.is_inference_mode_enabled(),
            autocast=tuple(
                (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds
            ),
            cache=torch.is_autocast_cache_enabled(),
            stream=torch.cuda.current_stream() if cuda else None,
        )

    def run(self, function: Callable[[], T]) -> T:
        """``function()`` under this state, in the current thread."""
        return self.context.run(self._inside, function)

    def _inside(self, function: Callable[[], T]) -> T:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for kind, enabled, dtype in self.autocast:
                stack.enter_context(
                    torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=self.cache)
                )
            if self.stream is not None:
                stack.enter_context(torch.cuda.stream(self.stream))
            return function()


def run(function: Callable[[], Any]) -> Future[Any]:
    """``function()`` on a pool thread under the caller's state."""
    global _pool
    caller = Caller.here()
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="torch_mux")
        return _pool.submit(caller.run, function)


def _forked() -> None:
    global _lock, _pool
    _lock, _pool = threading.Lock(), None  # the child has none of the threads


os.register_at_fork(after_in_child=_forked)


@state.on_reset
def _drop() -> None:
    global _pool
    pool, _pool = _pool, None
    if pool is not None:
        pool.shutdown(wait=False)

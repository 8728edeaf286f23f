"""CUDA-graph capture beside other threads of the process that use the device."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

__all__ = ["capturing", "guard_synchronize"]

_lock = threading.RLock()


def capturing() -> AbstractContextManager[object]:
    """Held while a graph is captured; device-wide synchronisation waits until it is free."""
    return _lock


def guard_synchronize() -> None:
    """Makes ``torch.cuda.synchronize`` and ``torch.accelerator.synchronize`` wait for captures in progress.

    CUDA refuses to synchronise a device while any thread captures on it, in every capture mode: the call
    raises and the capture is lost. Captures happen at any time on the compile thread, so both functions are
    wrapped, for the whole process; a capture takes milliseconds. Streams and events may be synchronised as
    ever. Idempotent.
    """
    for module in (torch.cuda, torch.accelerator):
        _wrap(module)


def _wrap(module: Any) -> None:
    original: Callable[..., None] = module.synchronize
    if getattr(original, "waits_for_captures", False):
        return

    @functools.wraps(original)
    def synchronize(*args: Any, **kwargs: Any) -> None:
        with _lock:
            original(*args, **kwargs)

    synchronize.waits_for_captures = True  # type: ignore[attr-defined]
    module.synchronize = synchronize

"""CUDA-graph capture beside other threads of the process that use the device."""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from .driver import call

__all__ = ["capturing", "guard_synchronize", "leave_captures_alone"]

log = logging.getLogger(__name__)

_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_lock = threading.RLock()
_local = threading.local()


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


def leave_captures_alone() -> None:
    """Nothing that this thread does from now on ends a capture of another thread.

    In the global mode, which ``torch.cuda.graph`` takes by default, a capture is lost when any thread of the
    process allocates device memory, loads a kernel or asks for an event, and until the process ends torch's
    generator believes that it goes on. A thread that knows that it touches nothing of others' captures may
    say so (``cuThreadExchangeStreamCaptureMode``); its own captures allow it these calls too. Before CUDA is
    in use, and when it was said already, this does nothing. That CUDA refuses is logged, no more: others'
    captures then end as they would without torch_mux.
    """
    cuda: Any = torch.cuda
    if getattr(_local, "told", False) or not cuda.is_initialized():
        return
    _local.told = True
    try:
        call("cuThreadExchangeStreamCaptureMode", ctypes.byref(ctypes.c_int(_RELAXED)))
    except (OSError, RuntimeError):
        log.warning("captures of other threads are not protected from this one", exc_info=True)


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

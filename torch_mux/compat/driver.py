"""Calls of the CUDA driver, for what neither torch nor the CUDA runtime under it offers."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, cast

import torch

__all__ = ["call", "driver", "own_stream"]

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING


@cache
def driver() -> Any:
    """The library."""
    return ctypes.CDLL("libcuda.so.1")


def call(name: str, *arguments: Any) -> None:
    """A call of the driver, without the GIL.

    Raises:
        RuntimeError: it failed.
    """
    error = getattr(driver(), name)(*arguments)
    if error:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(ctypes.c_int(error), ctypes.byref(text))
        raise RuntimeError(f"CUDA error: {(text.value or b'unknown').decode()} ({name}: {error})")


@cache
def _context(index: int) -> ctypes.c_void_p:
    """The context in which torch works on a device, held for the life of the process."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(index))
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    return context


def own_stream(device: torch.device, priority: int) -> torch.cuda.Stream:
    """A new stream: torch hands out the same 32 a device and priority again and again.

    It lives as long as the process, since torch's allocator keeps the streams of what it lends.

    Args:
        priority: a lower number goes first.

    Raises:
        RuntimeError: what CUDA says.
    """
    cast(Any, torch.cuda).init()
    index = torch.cuda.current_device() if device.index is None else device.index
    found = ctypes.c_void_p()
    call("cuCtxPushCurrent_v2", _context(index))
    try:
        call("cuStreamCreateWithPriority", ctypes.byref(found), _NON_BLOCKING, ctypes.c_int(priority))
    finally:
        call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
    external = cast(Any, torch.cuda.ExternalStream)
    return cast(torch.cuda.Stream, external(found.value, device=torch.device("cuda", index)))

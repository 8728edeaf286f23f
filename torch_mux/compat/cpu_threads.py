"""How many threads a vendor call on the CPU may use, for this thread only.

``torch.set_num_threads`` also decides for every thread that has not computed yet, so what is called around
one bundle would reach a client's own work. OpenMP and MKL keep a number a thread; these are their functions,
from the libraries that torch has loaded.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

__all__ = ["threads"]

_TORCH = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"


@functools.cache
def _function(name: str) -> Callable[..., int] | None:
    """A function of the library that torch computes with, or of what that is linked to."""
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL(str(_TORCH)), name)
    except (OSError, AttributeError):
        return None
    return found


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Vendor calls of this thread use so many threads; nothing changes where torch has no OpenMP."""
    get, put = _function("omp_get_max_threads"), _function("omp_set_num_threads")
    mkl = _function("MKL_Set_Num_Threads_Local")
    if get is None or put is None:
        yield
        return
    torch.get_num_threads()  # has torch set this thread's number first, if it never has
    before = get()
    put(count)
    local = mkl(count) if mkl is not None else 0
    try:
        yield
    finally:
        put(before)
        if mkl is not None:
            mkl(local)

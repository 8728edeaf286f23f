"""CUDA graphs that are captured without the random number generator of the process."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch

from .captures import capturing
from .driver import call, driver
from .streams import current_stream

__all__ = ["Graph", "Pool", "captured", "end_lost_capture"]

_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL


class Pool:
    """Memory of graphs that never run at the same time.

    It is given back when the pool and its graphs are gone, not already when there is no graph for a while:
    torch never allocates from a pool again that nobody referred to.

    Attributes:
        device: index of the CUDA device.
        key: as ``torch.cuda.graph_pool_handle`` makes it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = torch.cuda.current_device() if device.index is None else device.index
        self.key: tuple[int, int] = torch.cuda.graph_pool_handle()
        torch._C._cuda_beginAllocateCurrentThreadToPool(self.device, self.key)  # refers to it
        torch._C._cuda_endAllocateToPool(self.device, self.key)
        weakref.finalize(self, torch._C._cuda_releasePool, self.device, self.key).atexit = False

    def nbytes(self) -> int:
        """What it takes of the device."""
        # Of this pool alone: a snapshot of everything holds the interpreter for tens of milliseconds.
        cuda: Any = torch.cuda
        segments: list[dict[str, Any]] = cuda.memory_snapshot(self.key)
        return sum(segment["total_size"] for segment in segments)

    @contextmanager
    def allocating(self) -> Iterator[None]:
        """What this thread allocates meanwhile comes from the pool."""
        torch._C._cuda_beginAllocateCurrentThreadToPool(self.device, self.key)  # refers to it once more
        try:
            yield
        finally:
            torch._C._cuda_endAllocateToPool(self.device, self.key)
            torch._C._cuda_releasePool(self.device, self.key)


def end_lost_capture(pool: Pool) -> None:
    """After ``torch.cuda.graph`` into ``pool``, of the current device, has raised when the capture ended.

    torch goes on believing that it captures then: everything that this thread allocates on that stream would
    come from the pool, and no thread of the process could draw random numbers on the device any more. The
    current stream is still that of the capture; whoever began it sets his own again.
    """
    with suppress(RuntimeError):  # the capture had not begun to allocate
        torch._C._cuda_endAllocateToPool(pool.device, pool.key)
        torch._C._cuda_releasePool(pool.device, pool.key)
    with capturing(), torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="relaxed"):
        torch.zeros(1, device=torch.device("cuda", pool.device))  # torch warns of an empty graph


class Graph:
    """A captured graph, ready to be launched.

    Attributes:
        address: its ``cudaGraphExec_t``.
        pool: where its memory is.
    """

    def __init__(self, address: int, pool: Pool) -> None:
        self.address = address
        self.pool = pool
        weakref.finalize(self, driver().cuGraphExecDestroy, ctypes.c_void_p(address)).atexit = False

    def replay(self, stream: torch.cuda.Stream) -> None:
        """Launches it on ``stream``.

        Raises:
            RuntimeError: what CUDA says.
        """
        call("cuGraphLaunch", ctypes.c_void_p(self.address), ctypes.c_void_p(stream.cuda_stream))


def captured(run: Callable[[], object], pool: Pool, *, allocating: bool = True) -> Graph:
    """Captures what ``run`` enqueues from this thread on the current stream, which is not the default one.

    Streams that are made to wait for that one, and that it waits for in the end, are captured too, whoever
    enqueues on them.

    ``torch.cuda.CUDAGraph`` registers the device's default generator with every capture, and until that ends
    the generator refuses to draw, in every thread of the process. With the generator swapped for a copy
    meanwhile, other threads draw numbers that are drawn again later. So the driver is called directly, and
    torch's allocator is told as ``torch.cuda.use_mem_pool`` tells it. Nothing that draws may be captured.

    Args:
        pool: of the current device.
        allocating: what this thread allocates meanwhile comes from the pool. If not, ``run`` sees to it, for
            one thread at a time.

    Raises:
        RuntimeError: what CUDA says; also where another thread's use of the device ended the capture.
    """
    stream = current_stream(torch.device("cuda", pool.device)).cuda_stream
    with pool.allocating() if allocating else nullcontext():
        recorded = _recorded(run, ctypes.c_void_p(stream))
    return Graph(_instantiated(recorded), pool)


def _recorded(run: Callable[[], object], stream: ctypes.c_void_p) -> ctypes.c_void_p:
    """The ``cudaGraph_t``."""
    recorded = ctypes.c_void_p()
    call("cuStreamBeginCapture_v2", stream, ctypes.c_int(_THREAD_LOCAL))
    try:
        run()
    except BaseException:
        driver().cuStreamEndCapture(stream, ctypes.byref(recorded))
        driver().cuGraphDestroy(recorded)
        raise
    call("cuStreamEndCapture", stream, ctypes.byref(recorded))
    return recorded


def _instantiated(recorded: ctypes.c_void_p) -> int:
    executable = ctypes.c_void_p()
    try:
        call("cuGraphInstantiateWithFlags", ctypes.byref(executable), recorded, ctypes.c_ulonglong(0))
    finally:
        driver().cuGraphDestroy(recorded)
    return executable.value or 0

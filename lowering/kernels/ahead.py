"""Super-kernels compiled and loaded before anything launches them, several at once.

Triton's compiler lets go of the interpreter's lock in LLVM and runs ``ptxas`` and the C compiler of its
launchers as processes, so threads are enough: what stays serial is the walk over a kernel's syntax tree, a
quarter of the time. Imports no Triton, so that it can be read where there is none.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any, Final

import torch

from torch_mux import compat

if TYPE_CHECKING:
    from torch_mux.lowering.kernels.code import Buildable

__all__ = ["FIRST_SIZES", "Builder", "builder"]

log = logging.getLogger(__name__)

#: Bundle sizes that a new plan is made ready for before it serves.
FIRST_SIZES: Final = (1, 2, 16)


def _build(launch: Buildable) -> None:
    compat.leave_captures_alone()
    with torch.cuda.device(launch.device):
        launch.build()


def _processors() -> int:
    """Processors that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


class Builder:
    """Compiles and loads the kernels of launches on daemon threads, each variant once; safe from any thread.

    What fails to compile is logged only: whoever launches it gets the error.

    Args:
        build: makes one launch's kernel ready.
        threads: most that work at once; as many as the process may use processors by default.
    """

    def __init__(self, build: Callable[[Any], object] = _build, threads: int | None = None) -> None:
        self._build = build
        self._limit = threads or _processors()
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[Hashable, Future[None]] = {}
        self._queue: deque[tuple[Hashable, Buildable]] = deque()
        self._threads: set[threading.Thread] = set()

    def begin(self, launches: Iterable[Buildable]) -> list[Future[None]]:
        """Starts on what is not known yet; returns a future a launch, which never raises."""
        found: list[Future[None]] = []
        with self._lock:
            for launch in launches:
                if launch.grid == 0:
                    continue
                key = launch.variant
                future = self._known.get(key)
                if future is None:
                    future = self._known[key] = Future()
                    self._queue.append((key, launch))
                found.append(future)
            for _ in range(min(len(self._queue), self._limit - len(self._threads))):
                thread = threading.Thread(target=self._work, name="torch_mux-kernels", daemon=True)
                self._threads.add(thread)
                thread.start()
        return found

    def finish(self, launches: Iterable[Buildable]) -> None:
        """Returns when the kernels of all of these are ready, failed or were dropped by :meth:`close`."""
        wait(self.begin(launches))

    def close(self, timeout: float) -> None:
        """Drops what is queued and waits at most ``timeout`` seconds for what is being compiled."""
        deadline = time.monotonic() + timeout
        with self._lock:
            dropped = [self._known.pop(key) for key, _ in self._queue]
            self._queue.clear()
            threads = list(self._threads)
        for future in dropped:
            future.set_result(None)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def abandon_after_fork(self) -> None:
        """In a forked child the threads do not exist, nor what they were at."""
        self._start()

    def _work(self) -> None:
        compat.source_keys.ready()
        while True:
            with self._lock:
                if not self._queue:
                    self._threads.discard(threading.current_thread())
                    return
                key, launch = self._queue.popleft()
                future = self._known[key]
            try:
                self._build(launch)
            except Exception:
                log.info("%s was not compiled ahead", launch.kernel, exc_info=True)
            future.set_result(None)


#: The process's one builder.
builder: Final = Builder()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=builder.abandon_after_fork)

"""One thread for everything slow: compiling plans and capturing CUDA graphs, off the request path."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
from collections.abc import Callable

__all__ = ["CompileThread"]

logger = logging.getLogger(__name__)


class CompileThread:
    """Runs jobs one by one on a daemon thread that the first one starts; urgent ones first, else in order."""

    def __init__(self) -> None:
        self._jobs: list[tuple[int, int, Callable[[], object]]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._running = False
        self._closed = False

    def submit(self, job: Callable[[], object], urgent: bool = False) -> None:
        """Queues ``job``; what it raises is logged. After :meth:`close` it is dropped."""
        with self._changed:
            if self._closed:
                return
            heapq.heappush(self._jobs, (0 if urgent else 1, next(self._numbers), job))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="torch_mux-compile", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def quiesce(self, timeout: float | None = None) -> bool:
        """Waits until nothing is queued or running; False when ``timeout`` seconds passed before."""
        if threading.current_thread() is self._thread:
            return False
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs and not self._running, timeout)

    def close(self, timeout: float) -> None:
        """Drops what is queued and waits at most ``timeout`` seconds for what is running."""
        with self._changed:
            self._closed = True
            self._jobs.clear()
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._running = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if self._closed:
                    return
                _, _, job = heapq.heappop(self._jobs)
                self._running = True
            try:
                job()
            except Exception:
                logger.exception("a job of the compile thread failed")
            del job

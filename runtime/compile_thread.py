"""One thread for everything slow: compiling plans and capturing CUDA graphs, off the request path."""

from __future__ import annotations

import contextvars
import functools
import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable
from enum import IntEnum

__all__ = ["CompileThread", "Rank"]

logger = logging.getLogger(__name__)

_QUIET = 1.0


class Rank(IntEnum):
    """Which jobs go first: plans that requests wait for, captures, then what nobody asked for yet."""

    URGENT = 0
    WANTED = 1
    AHEAD = 2


class CompileThread:
    """Runs jobs one by one on a daemon thread that the first one starts; by rank, then in order.

    What nobody asked for yet starts in a quiet moment: a process that is just making its models is short of
    the interpreter's lock.

    Args:
        quiet: seconds after the last other job or :meth:`stir`; whoever waits in :meth:`quiesce` for jobs of
            the lowest rank ends the wait.
    """

    def __init__(self, quiet: float = _QUIET) -> None:
        self._quiet = quiet
        self._stirred = float("-inf")
        self._hurried = 0
        self._jobs: list[tuple[Rank, int, Callable[[], object]]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._running: Rank | None = None
        self._closed = False

    def submit(self, job: Callable[[], object], rank: Rank = Rank.WANTED) -> None:
        """Queues ``job``; what it raises is logged. After :meth:`close` it is dropped.

        It runs in a copy of the caller's context, where torch keeps what is configured there from 2.13 on.
        """
        run: Callable[[], object] = functools.partial(contextvars.copy_context().run, job)
        with self._changed:
            if self._closed:
                return
            heapq.heappush(self._jobs, (rank, next(self._numbers), run))
            if rank < Rank.AHEAD:
                self.stir()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="torch_mux-compile", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def quiesce(self, timeout: float | None = None, rank: Rank = Rank.WANTED) -> bool:
        """Waits until nothing up to ``rank`` is queued or running; False when ``timeout`` seconds passed."""
        if threading.current_thread() is self._thread:
            return False
        with self._changed:
            self._hurried += rank is Rank.AHEAD
            self._changed.notify_all()
            try:
                return self._changed.wait_for(lambda: not self._busy(rank), timeout)
            finally:
                self._hurried -= rank is Rank.AHEAD

    def stir(self) -> None:
        """Something new is under way: puts off what nobody asked for yet."""
        self._stirred = time.monotonic()

    def _busy(self, rank: Rank) -> bool:
        waiting = bool(self._jobs) and self._jobs[0][0] <= rank
        return waiting or (self._running is not None and self._running <= rank)

    @property
    def hurried(self) -> bool:
        """Whether somebody waits for jobs of the lowest rank."""
        return self._hurried > 0

    def _pause(self) -> float | None:
        """Seconds before the first job may start; None: there is none."""
        if not self._jobs:
            return None
        if self._jobs[0][0] < Rank.AHEAD or self._hurried:
            return 0.0
        return max(0.0, self._stirred + self._quiet - time.monotonic())

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
                self._running = None
                self._changed.notify_all()
                while not self._closed and (wait := self._pause()) != 0.0:
                    self._changed.wait(wait)
                if self._closed:
                    return
                self._running, _, job = heapq.heappop(self._jobs)
            try:
                job()
            except BaseException:  # were the thread to end, requests would wait for their plans for ever
                logger.exception("a job of the compile thread failed")
            del job

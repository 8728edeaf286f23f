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

from torch_mux import compat

__all__ = ["CompileThread", "Rank"]

logger = logging.getLogger(__name__)

_QUIET = 1.0
#: Of the time, at most, that jobs take which nobody waits for; and for how long one may put them off.
_DUTY = 0.1
_LONGEST_REST = 10.0
#: How long a job works before it leaves the interpreter to others, and for how long.
_STINT, _BREATH = 1e-3, 1e-3


class Rank(IntEnum):
    """Which jobs go first.

    ``URGENT``: plans that requests wait for. ``WANTED``: what runs launch by launch until it is there.
    ``SPARE``: what would only run better. ``AHEAD``: what nobody asked for yet.
    """

    URGENT = 0
    WANTED = 1
    SPARE = 2
    AHEAD = 3


class CompileThread:
    """Runs jobs one by one on a daemon thread that the first one starts; by rank, then in order.

    They are Python, and while one runs, threads that serve wait for the interpreter. So it changes hands
    faster then (:func:`torch_mux.compat.quick_switching`), a job may :meth:`breathe`, and what would only run
    better takes a tenth of the time at most. What nobody asked for yet starts in a quiet moment, since a
    process that is just making its models is short of the interpreter, too, and takes no more of the time
    while somebody is served. Who waits in :meth:`quiesce` ends all of that: he would rather have it now.

    Attributes:
        finished: jobs that have ended.

    Args:
        quiet: seconds after the end of the last other job or :meth:`stir`, for jobs of the lowest rank.
        interval: seconds for which a job may keep the interpreter while others ask for it; 0: Python's own.
            Asked at the beginning of each.
        serves: whether somebody is being served.
        clock: seconds, increasing; on which these moments and the time that jobs take are measured.
    """

    def __init__(
        self,
        quiet: float = _QUIET,
        interval: Callable[[], float] = lambda: 0.0,
        serves: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._quiet = quiet
        self._clock = clock
        self._interval = interval
        self._serves = serves
        self._stirred = self._rested = float("-inf")
        self._breathed = 0.0
        self._waiting: list[Rank] = []
        self._jobs: list[tuple[Rank, int, Callable[[], object]]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._running: Rank | None = None
        self._closed = False
        self.finished = 0
        self._held_back: list[Callable[[], object]] = []

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

    def holds_back(self, release: Callable[[], object]) -> None:
        """``release`` submits what its owner has not found worth a job yet; who waits for quiet wants it."""
        self._held_back.append(release)

    def quiesce(self, timeout: float | None = None, rank: Rank = Rank.SPARE) -> bool:
        """Waits until nothing up to ``rank`` is queued or running; False when ``timeout`` seconds passed."""
        if threading.current_thread() is self._thread:
            return False
        for release in self._held_back:
            release()
        with self._changed:
            self._waiting.append(rank)
            self._changed.notify_all()
            try:
                return self._changed.wait_for(lambda: not self._busy(rank), timeout)
            finally:
                self._waiting.remove(rank)

    def stir(self) -> None:
        """Something new is under way: puts off what nobody asked for yet."""
        self._stirred = self._clock()

    def breathe(self) -> None:
        """For jobs, now and then: leaves the interpreter to others if it has had it for a while."""
        if time.perf_counter() - self._breathed > _STINT and not self._waiting:
            time.sleep(_BREATH)
            self._breathed = time.perf_counter()

    def _busy(self, rank: Rank) -> bool:
        waiting = bool(self._jobs) and self._jobs[0][0] <= rank
        return waiting or (self._running is not None and self._running <= rank)

    @property
    def ends(self) -> int:
        """Beginnings and ends of jobs so far: odd while one runs, and even otherwise."""
        return 2 * self.finished + (self._running is not None)

    @property
    def busy(self) -> bool:
        """Whether a job is running."""
        return self._running is not None

    @property
    def hurried(self) -> bool:
        """Whether somebody waits for jobs of the lowest rank."""
        return Rank.AHEAD in self._waiting

    def _pause(self) -> float | None:
        """Seconds before the first job may start; None: there is none."""
        if not self._jobs:
            return None
        rank = self._jobs[0][0]
        if rank < Rank.SPARE or any(rank <= other for other in self._waiting):
            return 0.0
        quiet = self._stirred + self._quiet if rank is Rank.AHEAD else self._rested
        return max(0.0, max(quiet, self._rested) - self._clock())

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
                rank, _, job = heapq.heappop(self._jobs)
                self._running = rank
            begun = self._clock()
            try:
                compat.leave_captures_alone()
                with compat.quick_switching(self._interval()):
                    job()
            except BaseException:  # were the thread to end, requests would wait for their plans for ever
                logger.exception("a job of the compile thread failed")
            del job
            self.finished += 1
            if rank < Rank.AHEAD:
                self.stir()  # whoever waited for it goes on now
            if rank is Rank.SPARE or (rank is Rank.AHEAD and self._serves()):
                took = self._clock() - begun
                self._rested = begun + took + min(_LONGEST_REST, took * (1 / _DUTY - 1))

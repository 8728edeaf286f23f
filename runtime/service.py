"""The dispatcher's own thread: for requests nobody waits for, ends on the device, collected models."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from torch_mux import compat
from torch_mux.runtime.gaps import Gaps

__all__ = ["Service"]

logger = logging.getLogger(__name__)

_INTERVAL = 2e-3
_LEAST = 1e-3  # so that it does not spin while somebody else holds the role
_MOST = 3600.0  # a lock's timeout is limited
_NEVER = float("inf")


class Service:
    """A daemon thread that starts when it is first needed and sleeps until somebody pokes it.

    Args:
        attend: one turn of work.
        flying: whether the device is at work; the thread then looks again every two milliseconds.
        alarm: seconds until it is to have a turn by itself.
        gaps: what the thread does when there is nothing to do.
        failed: told what ``attend`` raised; the thread ends then, and the next poke starts another.
    """

    def __init__(
        self,
        attend: Callable[[], object],
        flying: Callable[[], bool],
        alarm: Callable[[], float],
        gaps: Gaps,
        failed: Callable[[BaseException], object],
    ) -> None:
        self._attend = attend
        self._flying = flying
        self._alarm = alarm
        self._gaps = gaps
        self._failed = failed
        self._lock = threading.Lock()
        # SimpleQueue.put is the one hand-over that a weak reference's callback may use in any place.
        self._tokens: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._asleep = False
        self._closed = False

    def is_current(self) -> bool:
        """Whether the caller is this thread."""
        return threading.current_thread() is self._thread

    def start(self) -> None:
        """Starts the thread unless it runs."""
        if self._thread is None:
            with self._lock:
                if self._thread is None and not self._closed:
                    thread = threading.Thread(target=self._work, name="torch_mux-dispatch", daemon=True)
                    self._thread = thread
                    thread.start()

    def poke(self) -> None:
        """Asks for a turn; one that was asked for and has not begun is enough."""
        if self._thread is None:
            self.start()
        if self._tokens.empty():
            self._tokens.put(True)

    def poke_from_anywhere(self) -> None:
        """Asks for a turn, taking no lock; without a thread the next turn of anybody does the work."""
        self._tokens.put(True)

    def watch(self, at_once: bool) -> None:
        """Something is under way: makes sure that its end is seen, soon or ``at_once``."""
        if at_once or self._thread is None or self._asleep:
            self.poke()

    def close(self, timeout: float) -> None:
        """Ends the thread after its current turn; waits at most ``timeout`` seconds."""
        with self._lock:
            self._closed = True
            thread, self._thread = self._thread, None
        self._tokens.put(False)
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    def abandon_after_fork(self) -> None:
        """In a forked child the thread does not exist; none is started again."""
        self._lock = threading.Lock()
        self._thread = None
        self._closed = True

    def _work(self) -> None:
        me = threading.current_thread()
        try:
            compat.leave_captures_alone()
            while self._next_turn():
                self._attend()
        except BaseException as error:
            logger.exception("the dispatcher's thread failed")
            with self._lock:
                if self._thread is me:
                    self._thread = None
            self._failed(error)

    def _next_turn(self) -> bool:
        """Waits for a poke, or for the time to look at the device again; False: end."""
        flying = self._flying()
        self._asleep = not flying
        try:
            go = self._tokens.get(timeout=_INTERVAL if flying else self._rest())
            while go and not self._tokens.empty():
                go = self._tokens.get_nowait()
        except queue.Empty:
            go = True
            if not flying:
                self._gaps.tend()
        self._asleep = False
        return go and not self._closed

    def _rest(self) -> float | None:
        """Seconds to sleep at most while nothing is under way; None: until somebody pokes."""
        alarm, gap = self._alarm(), self._gaps.wait()
        seconds = min(max(_LEAST, alarm), gap)
        return min(seconds, _MOST) if seconds < _NEVER else None

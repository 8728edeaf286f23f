"""Clocks that a busy machine does not disturb."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["Punctual", "Told"]


class Told:
    """Seconds that pass when told."""

    def __init__(self, now: float = 100.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def runs_until(self, condition: Callable[[], object], step: float, seconds: float = 20.0) -> None:
        """Goes on by ``step`` after ``step`` until a condition holds, for so many real seconds at most."""
        last = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < last, "it did not happen in time"
            self.now += step
            time.sleep(0.5e-3)


class Punctual:
    """Real time but for what a busy machine adds to it: on this clock nobody comes late.

    It stands still while somebody is away who has an answer and is about to ask again, and after a pause in
    which nobody looked at it it goes on by ``step`` only.
    """

    def __init__(self, step: float = 0.5e-3) -> None:
        self._lock = threading.Lock()
        self._step = step
        self._now, self._looked, self._away = 100.0, time.perf_counter(), 0

    def __call__(self) -> float:
        with self._lock:
            return self._look()

    def _look(self) -> float:
        real = time.perf_counter()
        if not self._away:
            self._now += min(real - self._looked, self._step)
        self._looked = real
        return self._now

    def skips(self, seconds: float) -> None:
        """So much has passed at once."""
        with self._lock:
            self._now += seconds

    def leaves(self, count: int = 1) -> None:
        """So many have an answer."""
        with self._lock:
            self._look()
            self._away += count

    def returns(self) -> None:
        """One of those has asked again, or never will."""
        with self._lock:
            self._look()
            self._away -= 1

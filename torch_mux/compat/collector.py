"""Python's cyclic garbage collector, held off while PyTorch traces, and while requests are served if asked.

What rests is the threshold, not whether the collector is enabled: that is the user's, at any time. CPython
counts new container objects less those that went, with any threshold, 0 included. ``gc.freeze`` puts the
counts back to 0, but not the number of oldest objects, beside which new ones have to be a quarter for a full
collection. From 3.12 on the thread that is over the threshold collects at its next safe point.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

__all__ = ["SERVING", "Collector", "Rest", "paused_collector", "rest"]

_QUIET = 1.0
_LONGEST = 30.0
#: Thresholds while requests are served: new objects before the youngest are looked through, at 200 to 300 ns
#: each; such collections before the middle generation is, whose pauses are as short as these are few; and
#: collections of that before all objects are.
SERVING: Final = (2_000, 4, 1_000)
#: What a trace may leave for the next collection of the youngest to look through at once.
_LITTLE: Final = 10 * SERVING[0]
#: Seconds between two looks whether that has been collected.
_LOOK: Final = 0.05


class Collector(Protocol):
    """What is asked of Python's ``gc``."""

    def isenabled(self) -> bool:
        """Whether it collects by itself."""
        ...

    def get_threshold(self) -> tuple[int, int, int]:
        """What the counts have to exceed."""
        ...

    def set_threshold(self, young: int, middle: int, old: int, /) -> None:
        """Sets what the counts have to exceed."""
        ...

    def get_count(self) -> tuple[int, int, int]:
        """New objects less those that went, and collections of each generation since the next older one's."""
        ...

    def collect(self, generation: int, /) -> int:
        """Looks through a generation and all younger ones; returns how many objects went."""
        ...


class Rest:
    """Rests the collector of this process; may be nested and entered from several threads.

    A trace makes millions of objects that live on, and each full collection walks them all again: a tenth of
    the time of a process's first trace. The collection that follows the last trace would come while somebody
    waits for the first answers, so it comes a quiet moment later. Who serves keeps the collector to small
    collections (:data:`SERVING`) and does the others himself, in moments in which nobody waits.

    Args:
        quiet: seconds after the last exit of a trace before the collector goes on.
        longest: seconds since the first entry after which it goes on as soon as nobody is inside; and after
            the last exit, where whoever serves is to collect first what the trace left.
        clock: seconds, increasing; on which these are measured.
        collector: Python's, or what plays its part.
    """

    def __init__(
        self,
        quiet: float = _QUIET,
        longest: float = _LONGEST,
        clock: Callable[[], float] = time.monotonic,
        collector: Collector = gc,
    ) -> None:
        self._clock = clock
        self.collector = collector
        self._quiet = quiet
        self._longest = longest
        self._start()

    def _start(self) -> None:
        self._changed = threading.Condition()
        self._tracing = False  # until a quiet moment after the last exit
        self._held = self._serving = 0
        self._since = self._left = 0.0
        self._made = 0  # new objects at the last exit
        self._before: tuple[int, int, int] | None = None
        self._ours: tuple[int, int, int] | None = None
        self._waiting = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No automatic collection in this process meanwhile, nor in the quiet moment after."""
        with self._changed:
            if not self._tracing:
                self._since = self._clock()
                self._tracing = True
                self._apply()
            self._held += 1
        try:
            yield
        finally:
            with self._changed:
                self._held -= 1
                self._left, self._made = self._clock(), self.collector.get_count()[0]
                if not self._held:
                    self._end()

    def serve(self, on: bool) -> None:
        """Somebody begins, or ends, to collect in idle moments himself; the last who ends puts all back."""
        with self._changed:
            self._serving = max(0, self._serving + (1 if on else -1))
            self._apply()

    def given(self) -> bool:
        """Whether to collect is up to who serves: nobody traces, and the user has said nothing else since."""
        return (
            self._serving > 0
            and not self._held
            and (not self._tracing or self._clock() - self._left >= self._quiet)
            and self._ours is not None
            and self.collector.isenabled()
            and self.collector.get_threshold() == self._ours
        )

    def _apply(self) -> None:
        """Sets the thresholds that are wanted now, unless somebody else has set others meanwhile."""
        found = self.collector.get_threshold()
        rests = self._tracing or self._serving > 0
        if self._before is None and rests and found[0]:
            self._before = self._ours = found
        if self._before is not None and found == self._ours:
            self.collector.set_threshold(*self._wanted(self._before))
            self._ours = self.collector.get_threshold()
        if not rests:
            self._before = self._ours = None

    def _wanted(self, before: tuple[int, int, int]) -> tuple[int, ...]:
        if self._tracing:
            return 0, *before[1:]
        if not self._serving:
            return before
        young, middle, old = SERVING
        if not before[2]:  # Python 3.14.0, which collects a part of all old objects with the youngest
            middle = before[1]
        return max(before[0], young), min(before[1], middle), max(before[2], old)

    def _end(self) -> None:
        if self._left - self._since >= self._longest:
            self._go_on()
        elif not self._waiting:
            try:
                threading.Thread(target=self._wait, name="torch_mux-collector", daemon=True).start()
                self._waiting = True
            except RuntimeError:  # the interpreter is about to exit
                self._go_on()

    def _wait(self) -> None:
        with self._changed:
            while self._tracing:
                pause = self._quiet / 2 if self._held else self._pause(self._clock() - self._left)
                if pause > 0.0:
                    self._changed.wait(pause)
                else:
                    self._go_on()
            self._waiting = False

    def _pause(self, since: float) -> float:
        """Seconds to rest, so long after the last exit; where somebody serves, until he has collected."""
        if not self._serving:
            return max(self._quiet - since, self._quiet / 2) if since < self._quiet else 0.0
        left_over = self._made > _LITTLE and self.collector.get_count()[0] >= self._made
        return _LOOK if left_over and since < self._longest else 0.0

    def _go_on(self) -> None:
        self._tracing = False
        self._apply()

    def after_fork(self) -> None:
        """In a forked child nobody is inside but, perhaps, the thread that forked; the rest is over."""
        self._tracing, self._serving = False, 0
        self._apply()
        self._start()


rest = Rest()
paused_collector = rest.paused

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=rest.after_fork)

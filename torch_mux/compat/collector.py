"""Python's cyclic garbage collector, held off while PyTorch traces and until the first answers are out."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Rest", "paused_collector"]

_QUIET = 1.0
_LONGEST = 30.0


class Rest:
    """Rests the collector of this process; may be nested and entered from several threads.

    A trace makes millions of objects that live on, and each full collection walks them all again: a tenth of
    the time of a process's first trace. The collection that follows the last trace would come while somebody
    waits for the first answers, so it comes a quiet moment later. The threshold is what changes, not whether
    the collector is enabled: that is the user's, at any time.

    Args:
        quiet: seconds after the last exit before the collector goes on.
        longest: seconds since the first entry after which it goes on as soon as nobody is inside.
        clock: seconds, increasing; on which these are measured.
    """

    def __init__(
        self,
        quiet: float = _QUIET,
        longest: float = _LONGEST,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._quiet = quiet
        self._longest = longest
        self._start()

    def _start(self) -> None:
        self._changed = threading.Condition()
        self._held = 0
        self._since = self._left = 0.0
        self._before: tuple[int, int, int] | None = None
        self._waiting = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No automatic collection in this process meanwhile, nor in the quiet moment after."""
        with self._changed:
            if self._before is None and gc.get_threshold()[0]:
                self._since = self._clock()
                self._before = before = gc.get_threshold()
                gc.set_threshold(0, *before[1:])
            self._held += 1
        try:
            yield
        finally:
            with self._changed:
                self._held -= 1
                self._left = self._clock()
                if not self._held:
                    self._end()

    def _end(self) -> None:
        if self._left - self._since >= self._longest:
            self._restore()
        elif self._before is not None and not self._waiting:
            try:
                threading.Thread(target=self._wait, name="torch_mux-collector", daemon=True).start()
                self._waiting = True
            except RuntimeError:  # the interpreter is about to exit
                self._restore()

    def _wait(self) -> None:
        with self._changed:
            while self._before is not None:
                left = self._left + self._quiet - self._clock()
                if self._held or left > 0:
                    self._changed.wait(max(left, self._quiet / 2))
                else:
                    self._restore()
            self._waiting = False

    def _restore(self) -> None:
        """The threshold is as it was, unless somebody has set another one meanwhile."""
        before, self._before = self._before, None
        if before is not None and gc.get_threshold()[0] == 0:
            gc.set_threshold(*before)

    def after_fork(self) -> None:
        """In a forked child nobody is inside but, perhaps, the thread that forked; the rest is over."""
        self._restore()
        self._start()


_rest = Rest()
paused_collector = _rest.paused

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_rest.after_fork)

"""How long a thread may keep the interpreter while others wait for it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quick_switching"]


class _Switching:
    """The process's interval, which is the least that anybody inside asks for.

    Whatever somebody else sets meanwhile stays.
    """

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._asked: dict[object, float] = {}
        self._before = self._ours = 0.0

    @contextmanager
    def quick(self, seconds: float = 1e-3) -> Iterator[None]:
        """Threads hand the interpreter over after ``seconds`` meanwhile; nested, and from several threads.

        Python's own interval is 5 ms. Whoever serves asks for the interpreter several times a request, and a
        thread that reads a file or loads a kernel after each step: beside one thread that computes each of
        these takes as long (a hash of Triton's 400 MB two seconds beside a trace, half a second alone).

        Args:
            seconds: 0 changes nothing, nor does more than the interval there is.
        """
        me = object()
        with self._lock:
            if not self._asked:
                self._before = self._ours = sys.getswitchinterval()
            if seconds:
                self._asked[me] = seconds
                self._apply()
        try:
            yield
        finally:
            with self._lock:
                if self._asked.pop(me, None) is not None:  # else this is the child of a fork
                    self._apply()

    def _apply(self) -> None:
        if sys.getswitchinterval() == self._ours:
            wanted = min([self._before, *self._asked.values()])
            if wanted != self._ours:
                sys.setswitchinterval(wanted)
                self._ours = sys.getswitchinterval()

    def after_fork(self) -> None:
        """In a forked child: nobody is inside."""
        self._asked.clear()
        self._apply()
        self._start()


_switching = _Switching()
quick_switching = _switching.quick

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_switching.after_fork)

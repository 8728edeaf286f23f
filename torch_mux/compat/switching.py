"""How long a thread may keep the interpreter while another one waits for it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quick_switching"]

_QUICK = 1e-3


class _Switching:
    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._held = 0
        self._before: float | None = None

    @contextmanager
    def quick(self) -> Iterator[None]:
        """Threads take turns every millisecond meanwhile; may be nested and entered from several threads.

        Reading a file or loading a kernel lets go of the interpreter at each step, and gets it back from a
        thread that is busy after Python's 5 ms only: a hash of Triton's 400 MB took two seconds beside a
        trace, and half a second alone.
        """
        mine = self._lock
        with self._lock:
            if not self._held and sys.getswitchinterval() > _QUICK:
                self._before = sys.getswitchinterval()
                sys.setswitchinterval(_QUICK)
            self._held += 1
        try:
            yield
        finally:
            with self._lock:
                if mine is self._lock:  # else this is the child of a fork that happened inside
                    self._held -= 1
                    if not self._held:
                        self._restore()

    def _restore(self) -> None:
        """The interval is as it was, unless somebody has set another one meanwhile."""
        before, self._before = self._before, None
        if before is not None and abs(sys.getswitchinterval() - _QUICK) < 1e-5:
            sys.setswitchinterval(before)

    def after_fork(self) -> None:
        self._restore()
        self._start()


_switching = _Switching()
quick_switching = _switching.quick

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_switching.after_fork)

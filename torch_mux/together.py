"""Guarded calls of one round, each in a thread of its own, kept together until each has reached its graph."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["Assembly", "current"]

PATIENCE = 0.02
"""Longest wait for the others, in seconds: some sixty calls' guards, and short enough to go unnoticed where
one of them compiles, or waits for something that another one holds."""

_CURRENT: ContextVar[Assembly | None] = ContextVar("torch_mux_assembly", default=None)

current = _CURRENT.get


class Assembly:
    """A meeting point of threads that submit one request after another.

    Guards take each thread some time and the interpreter lets one thread at a time pass: without a meeting
    point the first request finds the device idle and goes out alone, the next few follow while it runs, and
    so on. Whoever has queued a request waits until everybody still on the way has queued one or has ended,
    then all go on. After one wait beyond ``PATIENCE`` nobody waits any more.
    """

    def __init__(self, members: int, most: int) -> None:
        """``members`` threads, of which at most ``most`` run at once."""
        self._condition = threading.Condition()
        self._open = members
        self._most = most
        self._waiting = 0
        self._meeting = 0
        self._late = False

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Has what this context starts meet here."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)

    def arrive(self) -> None:
        """Waits until all others have arrived or ended."""
        with self._condition:
            if self._late:
                return
            meeting, until = self._meeting, time.monotonic() + PATIENCE
            self._waiting += 1
            self._meet()
            while self._meeting == meeting:
                left = until - time.monotonic()
                if left <= 0:
                    self._late = True
                    self._meet()
                else:
                    self._condition.wait(left)

    def leave(self) -> None:
        """One member has ended."""
        with self._condition:
            self._open -= 1
            self._meet()

    def _meet(self) -> None:
        if self._late or self._waiting >= min(self._open, self._most):
            self._waiting = 0
            self._meeting += 1
            self._condition.notify_all()

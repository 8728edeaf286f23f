"""A time limit for what cannot be asked to stop: compilers above all."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["OverLimit", "within"]


class OverLimit(TimeoutError):
    """It was stopped because its time was over."""


@contextmanager
def within(seconds: float | None, what: str) -> Iterator[None]:
    """What runs inside is interrupted after ``seconds``; None: never.

    The alarm of the process interrupts Python code of the main thread, so the limit holds there alone, and a
    long call of a library is seen through first.

    Raises:
        OverLimit: the time was over; whatever else was raised for it is its cause.
        RuntimeError: a limit in another thread than the main one.
    """
    if seconds is None:
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("a time limit needs the main thread")
    fired = False
    words = f"{what} took longer than {seconds:g} s"

    def alarm(number: int, frame: FrameType | None) -> None:
        nonlocal fired
        fired = True
        raise OverLimit(words)

    before = signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    except Exception as error:  # compilers wrap what is raised inside them
        if fired and not isinstance(error, OverLimit):
            raise OverLimit(words) from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)

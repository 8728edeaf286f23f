"""Functions that run one at a time, each on its own thread, and hand over where they choose."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any, Final

from torch_mux import compat

__all__ = ["ENDED", "Abandoned", "Hand", "Stepper"]

#: What :meth:`Stepper.step` returns when the function has ended.
ENDED: Final = object()

#: Gives a value to whoever steps, blocks until the next step, and returns what that step brings.
Hand = Callable[[Any], Any]


class Abandoned(BaseException):
    """Raised inside a function that nobody will step any more; no handler of ordinary errors keeps it."""


@dataclass(frozen=True)
class _Raised:
    error: BaseException


class Stepper:
    """A thread that runs one function after another, each step by step: it runs only inside :meth:`step`.

    The thread lives as long as the stepper, so that what libraries keep a thread (handles, pools of threads)
    is made once. Not safe for several threads that step at once.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._steps: SimpleQueue[Any] = SimpleQueue()
        self._values: SimpleQueue[Any] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._unfinished = False  # the function has begun and not ended
        self._stepping = False  # somebody waits, or was interrupted while he waited, for its next value

    def begin(self, function: Callable[[Hand], object]) -> None:
        """Sets up ``function``, which gets what it hands values over with; it starts at the first step."""
        if self._unfinished:
            raise RuntimeError(f"{self._name} has not ended what it runs")
        if self._thread is None:
            queues = (self._steps, self._values)
            thread = threading.Thread(target=_work, args=queues, name=self._name, daemon=True)
            thread.start()
            self._thread = thread
        context = contextvars.copy_context()
        self._unfinished = True
        self._send(lambda hand: context.run(function, hand))

    def _send(self, message: Any) -> Any:
        self._stepping = True
        self._steps.put(message)
        return self._receive()

    def _receive(self) -> Any:
        found = self._values.get()
        self._stepping = False
        return found

    def step(self, reply: object = None) -> Any:
        """Lets the function go on, with ``reply`` from its last handing over, until it hands over or ends.

        Returns:
            What it handed over, or :data:`ENDED`.

        Raises:
            Exception: what the function raised; it has ended then.
        """
        found = self._send(reply)
        if found is ENDED or isinstance(found, _Raised):
            self._unfinished = False
        if isinstance(found, _Raised):
            raise found.error
        return found

    def abandon(self) -> None:
        """Ends the function where it is, if it has not ended; what it raises meanwhile is nobody's."""
        while self._unfinished:
            found = self._receive() if self._stepping else self._send(_Raised(Abandoned()))
            if found is ENDED or isinstance(found, _Raised):
                self._unfinished = False

    def close(self) -> None:
        """Ends the thread; the stepper may begin again with a new one."""
        self.abandon()
        if self._thread is not None:
            self._steps.put(None)
            self._thread.join()
            self._thread = None

    def __del__(self) -> None:
        self._steps.put(None)  # the thread holds the queues only, and ends


def _hand(steps: SimpleQueue[Any], values: SimpleQueue[Any], value: object) -> object:
    """On the thread: gives ``value`` away and waits for the next step."""
    values.put(value)
    reply = steps.get()
    if isinstance(reply, _Raised):
        raise reply.error
    return reply


def _work(steps: SimpleQueue[Any], values: SimpleQueue[Any]) -> None:
    hand = partial(_hand, steps, values)
    while True:
        run = steps.get()
        if run is None:
            return
        try:
            compat.leave_captures_alone()
            hand(None)  # set up
            run(hand)
        except BaseException as error:
            outcome: object = _Raised(error)
        else:
            outcome = ENDED
        del run
        values.put(outcome)
        del outcome

"""The result of ``submit``: a future for threads and for asyncio."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections import deque
from collections.abc import Callable, Generator
from typing import Any, Final, Protocol, TypeVar
from weakref import WeakKeyDictionary

from torch_mux.errors import CancelledRequest, MuxError

__all__ = ["ENDED", "Future", "Source", "kept", "raised"]

log = logging.getLogger(__name__)
Raised = TypeVar("Raised", bound=BaseException)


class Source(Protocol):
    """What a future waits for: an engine's request, or a call on the pool."""

    def result(self) -> Any:
        """Blocks until there is one."""
        ...

    def done(self) -> bool:
        """Whether it ended."""
        ...

    def cancel(self) -> bool:
        """Whether it was taken back in time."""
        ...

    def add_done_callback(self, callback: Callable[[Any], object], /) -> None:
        """Calls ``callback`` once it ended."""
        ...


class _Ended:
    """The source of an answer that is known from the start, and of all such."""

    def result(self) -> None:
        """See :class:`Source`."""

    def done(self) -> bool:
        """See :class:`Source`."""
        return True

    def cancel(self) -> bool:
        """See :class:`Source`."""
        return False

    def add_done_callback(self, callback: Callable[[Any], object], /) -> None:
        """See :class:`Source`; what a callback raises is logged."""
        try:
            callback(self)
        except Exception:
            log.exception("a done callback of a request raised")


ENDED: Final = _Ended()


class Future:
    """The answer to one ``torch_mux.submit``: ``.result()`` from any thread, or ``await`` it.

    ``result()`` orders the caller's current CUDA stream behind the answer; it does not wait for the device.

    Args:
        source: what it waits for.
        tenant: for whom, as errors say.
        finish: the answer from the source, once that has ended.
        error: why there is none, where that is known already.
    """

    def __init__(
        self,
        source: Source,
        tenant: str,
        finish: Callable[[Any], Any],
        error: BaseException | None = None,
    ) -> None:
        self._source = source
        self._tenant = tenant
        self._finish = finish
        self._lock = threading.Lock()
        self._answer: tuple[Any, BaseException | None] | None = None if error is None else (None, error)

    def done(self) -> bool:
        """Whether it ended: with a result, an error or a cancellation."""
        return self._source.done()

    def cancel(self) -> bool:
        """Takes the request back; False if it has gone out already."""
        return bool(self._source.cancel())

    def result(self, timeout: float | None = None) -> Any:
        """What the model returned.

        Args:
            timeout: most seconds to wait, None for no limit.

        Raises:
            TimeoutError: no result within ``timeout``; the request goes on.
            CancelledRequest: it was cancelled.
            Exception: whatever the model raised.
        """
        if timeout is not None:
            self._wait(timeout)
        answer, error = self._settle()
        if error is None:
            return answer
        try:
            raise raised(error)
        finally:
            del self, error  # the traceback of a model's error holds this frame

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What ``result()`` would raise, or None.

        Raises:
            TimeoutError: nothing within ``timeout``.
        """
        if timeout is not None:
            self._wait(timeout)
        return self._settle()[1]

    def add_done_callback(self, callback: Callable[[Future], object]) -> None:
        """Calls ``callback(self)`` once it ended, at once if it has, from whichever thread finds out."""
        self._source.add_done_callback(lambda _: callback(self))

    def __await__(self) -> Generator[Any, None, Any]:
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        self._source.add_done_callback(lambda _: _wake(loop, waiter))
        try:
            yield from waiter
        except asyncio.CancelledError:
            self.cancel()
            raise
        try:
            return self.result()
        finally:
            del self  # as in result

    def _wait(self, timeout: float) -> None:
        if self._source.done():
            return
        ended = threading.Event()
        self._source.add_done_callback(lambda _: ended.set())
        if not ended.wait(timeout):
            raise TimeoutError(f"no result within {timeout} s; the request goes on")

    def _settle(self) -> tuple[Any, BaseException | None]:
        # On CUDA this also makes the calling thread's stream wait, so the source is asked every time.
        with self._lock:
            first = self._answer is None
            if self._answer is None:
                self._answer = self._outcome()
            answer = self._answer
        if not first and answer[1] is None:
            self._source.result()
        return answer

    def _outcome(self) -> tuple[Any, BaseException | None]:
        try:
            return self._finish(self._source), None
        except concurrent.futures.CancelledError:
            return None, CancelledRequest(tenant=self._tenant)
        except Exception as error:
            return None, kept(error)


def kept(error: Raised) -> Raised:
    """An error that is kept, to be raised later, without the frames of ours that it came through.

    They hold requests and inputs, and who keeps the error; only Python's garbage collector would end them.
    What a model itself raised keeps its frames, but for the one that asks.
    """
    found = error.__traceback__
    inner = None if isinstance(error, MuxError) or found is None else found.tb_next
    return error.with_traceback(inner)


def raised(error: BaseException) -> BaseException:
    """What to raise for an error that is kept; of a model's it is the same each time."""
    return error.again() if isinstance(error, MuxError) else error


_woken: WeakKeyDictionary[asyncio.AbstractEventLoop, deque[asyncio.Future[None]]] = WeakKeyDictionary()
_woken_lock = threading.Lock()


def _wake(loop: asyncio.AbstractEventLoop, waiter: asyncio.Future[None]) -> None:
    """Wakes ``waiter`` in its loop: one thread-safe call for all that end together."""
    with _woken_lock:
        queue = _woken.setdefault(loop, deque())
        queue.append(waiter)
        if len(queue) > 1:
            return
    try:
        loop.call_soon_threadsafe(_drain, loop)
    except RuntimeError:
        log.debug("an event loop was closed before its request ended")
        with _woken_lock:
            _woken.pop(loop, None)


def _drain(loop: asyncio.AbstractEventLoop) -> None:
    with _woken_lock:
        queue = _woken.pop(loop, deque())
    for waiter in queue:
        if not waiter.done():
            waiter.set_result(None)

"""A request: one call of one instance, from ``submit`` to its result."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from enum import Enum
from typing import TYPE_CHECKING

from torch_mux.errors import ClosedError, MuxError
from torch_mux.runtime.leaving import wait_if_leaving
from torch_mux.types import Quota

if TYPE_CHECKING:
    from torch_mux.runtime.dispatch import Dispatcher
    from torch_mux.runtime.instance import Instance
    from torch_mux.runtime.scheduler.delays import Delay
    from torch_mux.runtime.served import ServedProgram

__all__ = ["Request", "RequestState", "Waiter", "by_dispatcher"]


class RequestState(Enum):
    """Where a request is on its way.

    ``RUNNING`` on CUDA means enqueued: the outputs are valid in stream order, the device may still be at
    work.
    """

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    ERROR = "error"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


_QUEUED, _RUNNING = RequestState.QUEUED, RequestState.RUNNING
_NEVER = float("inf")


class Waiter:
    """A blocked thread: woken when its requests have gone out, or when it shall dispatch for everybody.

    Every method but :meth:`block` is called with the dispatcher's mutex held, so that a signal is neither
    lost nor left over for a later wait.
    """

    __slots__ = ("_gate", "left", "signalled")

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._gate.acquire()
        self.left = 0
        self.signalled = False

    def signal(self) -> None:
        """Wakes the thread; a second signal before it woke changes nothing."""
        if not self.signalled:
            self.signalled = True
            self._gate.release()

    def rearm(self) -> None:
        """Takes back a signal that nobody consumed."""
        if self.signalled:
            self.signalled = False
            self._gate.acquire(blocking=False)

    def block(self, timeout: float) -> bool:
        """Sleeps until signalled or ``timeout`` seconds passed; returns whether it was signalled."""
        return self._gate.acquire(timeout=max(0.0, timeout))


class Request:
    """One call of one instance.

    Attributes:
        instance: whose weights it reads.
        inputs: the program's inputs in order; dropped once the request ended.
        outputs: the graph's outputs in order, valid after :meth:`result`.
        quota: the tenant it is attributed to, and what that tenant may use.
        state: see :class:`RequestState`.
        error: what :meth:`result` raises, or None.
        arrival: seconds on the engine's clock when it was submitted.
        eligible: seconds on the clock before which its tenant's rate does not let it go out.
        due: seconds on the clock by which it should have ended, by ``slo`` and ``deadline``; else infinity.
        foreseen: whom to tell how long it took, and for how many seconds it was forecast; or None.
        expires: seconds on the clock from which on it does not go out any more, by ``deadline``.
        client: identity of the submitting thread, by which closed-loop cohorts are recognised.
        inference: whether the caller was in inference mode; its outputs are inference tensors then.
        alone: whether it ran per instance, so that its outputs were made on the lane's stream.
        out: whether it has gone out: :meth:`result` no longer blocks the host.
        mark: the event recorded on the caller's stream when it was submitted (CUDA), or None.
        flight: the bundle under way on an asynchronous device that carries it, or None.
    """

    __slots__ = (
        "alone",
        "arrival",
        "callbacks",
        "client",
        "dispatcher",
        "due",
        "eligible",
        "error",
        "expires",
        "flight",
        "foreseen",
        "inference",
        "inputs",
        "instance",
        "joined",
        "mark",
        "out",
        "outputs",
        "quota",
        "seq",
        "started",
        "state",
        "waiters",
    )

    def __init__(
        self,
        dispatcher: Dispatcher,
        instance: Instance,
        inputs: Sequence[object],
        outputs: list[object],
        quota: Quota,
        inference: bool,
        arrival: float,
        client: int,
    ) -> None:
        self.dispatcher = dispatcher
        self.instance = instance
        self.inputs: Sequence[object] = inputs
        self.outputs = outputs
        self.quota = quota
        self.inference = inference
        self.arrival = arrival
        self.started = arrival
        self.eligible = arrival
        self.due = self.expires = _NEVER
        if quota.timed:
            self.expires = arrival + (_NEVER if quota.deadline is None else quota.deadline)
            self.due = min(self.expires, arrival + (_NEVER if quota.slo is None else quota.slo))
        self.client = client
        self.seq = 0
        self.state = _QUEUED
        self.alone = False
        self.out = False
        self.error: Exception | None = None
        self.foreseen: tuple[Delay, float] | None = None
        self.mark: object = None
        self.flight: object = None
        self.joined: int | None = None
        self.waiters: tuple[Waiter, ...] = ()
        self.callbacks: tuple[Callable[[Request], object], ...] = ()

    @property
    def served(self) -> ServedProgram:
        """The program it runs."""
        return self.instance.served

    @property
    def work(self) -> int:
        """What it costs beside others in its bundle: floating-point operations, at least 1."""
        return self.instance.served.work

    def done(self) -> bool:
        """Whether it ended: result, error or cancellation; on CUDA once the device has finished it."""
        state = self.state  # once: what was running may be put back meanwhile
        return state is not _QUEUED and state is not _RUNNING

    def cancel(self) -> bool:
        """Takes it out of the queue; False when it has gone out already."""
        return self.dispatcher.cancel(self)

    def add_done_callback(self, callback: Callable[[Request], object]) -> None:
        """Calls ``callback(request)`` once it ended, at once if it has.

        The call comes from whichever thread finds out; it must be brief, and what it raises is logged.
        """
        self.dispatcher.add_done_callback(self, callback)

    def result(self) -> list[object]:
        """All outputs of the graph in order, ready to use on the caller's current stream.

        Blocks the host until the request has gone out (on the CPU: until it is computed).

        Raises:
            CancelledRequest: it was cancelled.
            ExecutionFailed: its plan did not compile or raised; the cause is chained.
            MuxError: any other reason why it could not be served.
        """
        if not self.out:
            self.dispatcher.wait((self,))
        outputs = self.outcome()
        self.dispatcher.executor.join((self,))
        return outputs

    def outcome(self) -> list[object]:
        """The outputs of a request that has gone out and that the caller's stream waits for already.

        For those who waited with :meth:`Engine.wait`; raises what :meth:`result` raises.
        """
        if self.error is not None:
            if isinstance(self.error, ClosedError):
                wait_if_leaving()
            raise self.error.again() if isinstance(self.error, MuxError) else self.error
        return self.outputs


def by_dispatcher(requests: Sequence[Request]) -> list[tuple[Dispatcher, Sequence[Request]]]:
    """The requests of each dispatcher, in order."""
    if not requests:
        return []
    first = requests[0].dispatcher
    for request in requests:
        if request.dispatcher is not first:
            break
    else:
        return [(first, requests)]
    groups: dict[Dispatcher, list[Request]] = {}
    for request in requests:
        groups.setdefault(request.dispatcher, []).append(request)
    return list(groups.items())

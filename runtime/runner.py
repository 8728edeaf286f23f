"""Runs bundles and ends requests, for whoever holds the dispatcher's role."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

from torch_mux import compat
from torch_mux.errors import DeadlineExceeded, DispatchFailed, MuxError
from torch_mux.runtime.accounting import Accounting
from torch_mux.runtime.bundle import Bundle
from torch_mux.runtime.busy import BusyTime
from torch_mux.runtime.executors.base import Executor, Flight
from torch_mux.runtime.instance import Instance
from torch_mux.runtime.interrupt import Interrupt
from torch_mux.runtime.line import Line, go_out
from torch_mux.runtime.memory import make_room, out_of_memory
from torch_mux.runtime.mixes import label_of
from torch_mux.runtime.request import Request, RequestState
from torch_mux.runtime.retirement import Retirement
from torch_mux.runtime.scheduler.base import Issue, Policy, QueueName, share_of
from torch_mux.runtime.served import ServedProgram, failure
from torch_mux.runtime.shares import PICOSECONDS
from torch_mux.runtime.timeline import recorders

__all__ = ["Runner", "call_back"]

logger = logging.getLogger(__name__)

_LATELY = 1.0
_RUNNING, _DONE = RequestState.RUNNING, RequestState.DONE
_ERROR, _CANCELLED, _EXPIRED = RequestState.ERROR, RequestState.CANCELLED, RequestState.EXPIRED
#: What is called with a request that has ended.
_Call = tuple[Callable[[Request], object], Request]


class Runner:
    """From an issued bundle to the ends of its requests.

    Attributes:
        dead: instances to forget once nothing of them is under way; appended to from anywhere.
        retirement: which plans rest.
        watched: somebody wants to be told when what is under way ends.
        interrupt: ends a wait for the device, and goes before callbacks that are still to be made.
        went, ended: seconds on the clock when the last bundle went out, and when requests ended last.
    """

    def __init__(
        self,
        executor: Executor,
        policy: Policy,
        clock: Callable[[], float],
        accounting: Accounting,
        mutex: threading.Lock,
        line: Line,
    ) -> None:
        self._executor = executor
        self._policy = policy
        self._clock = clock
        self._accounting = accounting
        self.mutex = mutex
        self._line = line
        self.retirement = Retirement(self._forget)
        self._underway: list[Bundle] = []
        self._untold: list[tuple[Issue, float]] = []
        self._busy = BusyTime()
        self.dead: deque[Instance] = deque()
        self.watched = False
        self.interrupt = Interrupt()
        self._calls: deque[_Call] = deque()
        self.went, self.ended = float("-inf"), clock()

    def serves(self) -> bool:
        """Whether a bundle went out within the last second."""
        return self._clock() - self.went < _LATELY

    def idle(self) -> float:
        """Seconds for which nothing has been pending or under way; negative while something is."""
        busy = self._underway or self._line.active or self._executor.flying()
        return -1.0 if busy else self._clock() - self.ended

    def pop(self, issue: Issue, now: float) -> Bundle:
        """Takes an issue's requests out of the line; the mutex is held."""
        requests = cast("list[Request]", list(issue.requests))
        served = requests[0].served
        self._line.send_out(requests, now)
        for request in requests:
            request.state = _RUNNING
            request.started = now
        bundle = Bundle(served, requests, issue)
        self._underway.append(bundle)
        self.went = now
        self._untold.append((issue, now))
        if not self._executor.asynchronous:
            self.tell()
        return bundle

    def tell(self) -> None:
        """The policy learns what went out: before it is asked again, and while the device works already."""
        while self._untold:
            issue, now = self._untold[0]
            try:
                self._policy.issued(issue, now)
            finally:
                del self._untold[0]

    def untold(self, name: QueueName) -> int:
        """Requests of a queue that go out just now, of which the policy does not know yet; for any thread."""
        issues = [issue for issue, _ in list(self._untold)]
        return sum([len(one.requests) for one in issues if one.queue == name])

    def _over(self, issue: Issue, now: float, seconds: float = 0.0, charge: float | None = None) -> None:
        if self._untold:
            self.tell()
        self._policy.completed(issue, now, seconds, charge)

    def _forget(self, served: ServedProgram) -> None:
        self.tell()
        self._policy.forget(served.key)

    def run(self, bundles: Sequence[Bundle]) -> None:
        """Runs or enqueues bundles, several as one if that can be; what they raise becomes their errors."""
        for bundle in bundles:
            self.retirement.turn(bundle.served, self._clock())
            self._refuse(bundle)
        left = [bundle for bundle in bundles if bundle.requests]
        whole = len(left) > 1 and all(bundle.served.retired is None for bundle in left)
        if not whole or not self._launch_together(left):
            for bundle in left:
                self._launch(bundle)
        self._underway = []
        self.tell()
        self.call_back(gives_way=True)

    def _launch_together(self, bundles: Sequence[Bundle]) -> bool:
        """Whether they went out as one. If that raised, each goes by itself: that tells whose fault it is."""
        started = self._clock()
        label = label_of(bundles)
        try:
            with compat.ranges(lambda: [f"mux::mix {label}"]):
                flights = self._executor.launch_together(bundles)
        except Exception as error:
            logger.warning("%s raised %r as one; each program goes out by itself", label, error)
            for bundle in bundles:
                bundle.run = None
            if out_of_memory(error):
                make_room(self._executor.device)
            return False
        if flights is None:
            return False
        work = sum(bundle.work for bundle in bundles)
        for bundle in bundles:
            bundle.served.sizes[len(bundle.requests)] += 1
            bundle.mix, bundle.part = label, bundle.work / work
            bundle.leads, bundle.coalesced = bundle is bundles[0], True
        if not flights:
            ended = self._clock()
            for bundle in bundles:
                self._settle(bundle, ended, ended - started, (ended - started) * bundle.part)
            return True
        self._gone(bundles)
        return True

    def _gone(self, bundles: Sequence[Bundle]) -> None:
        with self.mutex:
            for bundle in bundles:
                go_out(bundle.requests)
                if not self.watched and [request for request in bundle.requests if request.callbacks]:
                    self.watched = True

    def _refuse(self, bundle: Bundle) -> None:
        """Ends the requests whose tenants may not have their models prepared, before that costs memory."""
        memory = self._accounting.memory
        if memory is None or not bundle.served.coalesced or bundle.served.retired is not None:
            return
        refused: list[Request] = []
        for request in bundle.requests:
            if request.quota.memory is not None and request.instance.row is None:
                request.error = memory.unaffordable(request)
                if request.error is not None:
                    refused.append(request)
        if refused:
            self._over(bundle.issue, self._clock())
            bundle.requests = [request for request in bundle.requests if request.error is None]
            bundle.issue = replace(bundle.issue, requests=tuple(bundle.requests))
            self.end(refused, self._clock())

    def _launch(self, bundle: Bundle) -> None:
        started = self._clock()
        bundle.coalesced = bundle.served.coalesced and bundle.served.retired is None
        raised: Exception | None = None
        try:
            with compat.ranges(lambda: bundle.ranges):
                flight = self._executor.launch(bundle)
        except Exception as error:
            raised = error
        if out_of_memory(raised) and not bundle.again and bundle.coalesced:
            bundle.again = True
            make_room(self._executor.device)
            self._launch(bundle)
            return
        if raised is not None:
            # Not in the handler: what is raised next must not name it as its context.
            self._isolate(bundle, raised)
            return
        bundle.served.sizes[len(bundle.requests)] += 1
        if flight is None:
            ended = self._clock()
            self._settle(bundle, ended, ended - started, ended - started)
            return
        self._gone([bundle])

    def _settle(
        self, bundle: Bundle, ended: float, seconds: float, charge: float, flight: Flight | None = None
    ) -> None:
        """A bundle ended, by itself or with others, after ``seconds``, of which ``charge`` are its own.

        Those that were one are charged by their work.
        """
        bundle.whole = seconds
        bundle.seconds = seconds = seconds * bundle.part
        if bundle.coalesced and not [request for request in bundle.requests if request.error is not None]:
            self.retirement.ended(bundle, ended, seconds, charge, flight)
        self._over(bundle.issue, ended, seconds, charge)
        self._line.ended(bundle.requests, ended)
        self._accounting.ran(bundle.requests, charge, bundle.coalesced)
        self.end(bundle.requests, ended, self._calls)
        for timeline in recorders.active:
            timeline.add(bundle, ended)

    def _isolate(self, bundle: Bundle, error: Exception) -> None:
        """A bundle raised: each request runs again alone, so that only the guilty one fails."""
        self._over(bundle.issue, self._clock())
        if bundle.coalesced:
            self.retirement.failed(bundle.served, error)
        if len(bundle.requests) == 1:
            cause = error if isinstance(error, MuxError) else failure(bundle.served, error)
            bundle.requests[0].error = cause
            self.end(bundle.requests, self._clock())
            return
        logger.warning(
            "a bundle of %d requests of %s raised %r; each runs again alone",
            len(bundle.requests),
            bundle.served.program.name,
            error,
        )
        for request in bundle.requests:
            share = min(bundle.share, share_of((request,)))
            issue = replace(bundle.issue, requests=(request,), share=share)
            self._launch(Bundle(bundle.served, [request], issue))

    def land(self, gives_way: bool = False) -> bool:
        """Ends what the device has finished, releases the rows of collected models and makes all callbacks.

        Where it ``gives_way``, not while somebody's request should go out first; returns whether they are.
        """
        if self.dead:
            self.release_rows()
        landed = self._executor.reap()
        if landed:
            self._busy.divide(landed, self._executor.at_work())
        for flight in landed:
            for request in flight.bundle.requests:
                if flight.error is not None and request.error is None:
                    request.error = flight.error
            seconds = max(0.0, flight.seconds - flight.paused)
            charge = flight.charge / PICOSECONDS
            self._settle(flight.bundle, flight.ended, seconds, charge, flight)
            if flight.bundle.run is not None:
                flight.bundle.run.landed(charge, flight.error is not None)
        if self.watched and not self._executor.flying():
            self.watched = False
        self.call_back(gives_way)
        return not self._calls

    def call_back(self, gives_way: bool = False) -> None:
        """Makes the callbacks of what has ended, see :meth:`land`; one at least."""
        while self._calls:
            call_back(*self._calls.popleft())
            if gives_way and self.interrupt:
                return

    def release_rows(self) -> None:
        """Forgets the dead instances of which nothing is under way."""
        gone: list[Instance] = []
        with self.mutex:
            while self.dead:
                instance = self.dead.popleft()
                if instance.uses:
                    # It comes again when its last request ends.
                    continue
                if instance.dropped or not instance.alive:
                    instance.served.instances.discard(instance)
                gone.append(instance)
        for instance in gone:
            instance.free()

    def end(self, requests: Sequence[Request], now: float, calls: deque[_Call] | None = None) -> None:
        """Requests ended: counts, tells those who wait, and calls back. Any thread may call it.

        Args:
            calls: takes the callbacks, which are made at once otherwise.
        """
        callbacks: deque[_Call] = deque() if calls is None else calls
        for request in requests:
            if request.state is not _CANCELLED and request.state is not _EXPIRED:
                request.state = _DONE if request.error is None else _ERROR
            if request.state is not _DONE:
                request.outputs = []  # an error that is kept, with its frames, keeps no memory of a device
        self._accounting.ended(requests, now)
        self.ended = now
        with self.mutex:
            go_out(requests)
            for request in requests:
                request.inputs = ()
                request.mark = request.flight = None
                if request.callbacks:
                    callbacks.extend((callback, request) for callback in request.callbacks)
                    request.callbacks = ()
                instance = request.instance
                instance.uses -= 1
                if not instance.uses and (instance.removed or instance.dropped or not instance.alive):
                    self.dead.append(instance)
        while calls is None and callbacks:
            call_back(*callbacks.popleft())

    def add_done_callback(self, request: Request, callback: Callable[[Request], object]) -> bool:
        """See :meth:`Request.add_done_callback`; returns whether the device has to be watched for its end."""
        with self.mutex:
            ended = request.done()
            flying = request.out and not ended
            if not ended:
                request.callbacks = (*request.callbacks, callback)
            if flying:
                self.watched = True
        if ended:
            call_back(callback, request)
        return flying

    def fail(self, requests: Sequence[Request], error: BaseException) -> None:
        """Ends requests that the runtime could not serve."""
        for request in requests:
            if request.error is None:
                if isinstance(error, MuxError):
                    request.error = error
                else:
                    request.error = DispatchFailed(f"{type(error).__name__}: {error}")
                    request.error.__cause__ = error
        self.end(requests, self._clock())

    def expire(self, requests: Sequence[Request]) -> None:
        """Ends requests that were dropped because their deadline passed."""
        for request in requests:
            request.error = DeadlineExceeded(tenant=request.quota.tenant, deadline=request.quota.deadline)
        if requests:
            self.end(requests, self._clock())

    def rescue(self, error: BaseException) -> None:
        """Dispatching was interrupted: what was under way goes out later, or fails if it may not."""
        self.call_back()
        stranded = self.stranded()
        for served in dict.fromkeys(request.served for request in stranded):
            own = [request for request in stranded if request.served is served]
            if isinstance(error, Exception) or not served.coalesced:
                self.fail(own, error)
                continue
            with self.mutex:
                self._line.put_back(own)

    def stranded(self) -> list[Request]:
        """What was taken out of the line last and has not gone out; it is nobody's then."""
        bundles, self._underway = self._underway, []
        stranded: list[Request] = []
        for bundle in bundles:
            left = [request for request in bundle.requests if not request.out]
            if left:
                self._over(bundle.issue, self._clock())
            stranded += left
        return stranded

    def abandon_after_fork(self, mutex: threading.Lock) -> None:
        """In a forked child: whatever held the locks does not exist."""
        self.mutex = mutex
        self._accounting = Accounting()
        self._calls.clear()
        self._untold = []  # to tell the policy takes a lock
        self.dead.clear()


def call_back(callback: Callable[[Request], object], request: Request) -> None:
    """Calls a done callback; what it raises is logged."""
    try:
        callback(request)
    except Exception:
        logger.exception("a done callback of a request raised")

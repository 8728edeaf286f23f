"""The dispatcher of one device: a line, one role, and whoever holds it dispatches for everybody.

The caller that finds the role free takes it and sends out what the policy chooses until its own requests have
gone out; the others block on a light lock each. On release it is offered to a blocked caller whose request is
still pending, or to the service thread for requests that nobody waits for. What touches device or tables
happens under the role; the mutex guards the line only and is never held while something runs.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from torch_mux.errors import CancelledRequest, ClosedError
from torch_mux.runtime.accounting import Accounting
from torch_mux.runtime.driver import Driver
from torch_mux.runtime.executors.base import Executor
from torch_mux.runtime.gaps import Gaps
from torch_mux.runtime.health import DeviceHealth
from torch_mux.runtime.instance import Instance
from torch_mux.runtime.line import Line
from torch_mux.runtime.outlook import Prospect
from torch_mux.runtime.request import Request, RequestState, Waiter
from torch_mux.runtime.runner import Runner
from torch_mux.runtime.scheduler.base import Policy
from torch_mux.runtime.served import ServedProgram, failure, unservable
from torch_mux.runtime.service import Service
from torch_mux.settings import Settings
from torch_mux.types import Quota

__all__ = ["Dispatcher"]

logger = logging.getLogger(__name__)

_LIVENESS, _QUIET, _PAUSE = 1.0, 2e-3, 200e-6


class Dispatcher:
    """Line and role of one device; safe from any thread.

    Args:
        executor: the device.
        policy: who goes out together; only the role's holder asks it.
        clock: seconds; what arrivals and waits are measured on.
        gaps: what its thread does when no device has anything to do.
    """

    def __init__(
        self,
        executor: Executor,
        policy: Policy,
        clock: Callable[[], float],
        settings: Settings,
        accounting: Accounting,
        gaps: Gaps,
    ) -> None:
        self.executor = executor
        executor.configure(settings)
        self._clock = clock
        self._mutex = threading.Lock()
        self._line = Line()
        self._runner = Runner(executor, policy, clock, accounting, self._mutex, self._line)
        self.idle, self.serves = self._runner.idle, self._runner.serves
        self._driver = Driver(executor, policy, clock, settings, self._line, self._runner)
        self._runner.retirement.factor = settings.straggler
        self._holder: threading.Thread | None = None
        self.closed, self._released = False, float("-inf")  # closed: it takes nothing more
        alarm = self._line.alarms.peek
        self.service = Service(self.attend, executor.flying, lambda: alarm() - clock(), gaps, self.fail_all)

    @property
    def policy(self) -> Policy:
        """Who goes out together, on which lane."""
        return self._driver.policy

    def enqueue(self, requests: Sequence[Request]) -> None:
        """Appends requests, all at once: none of them goes out before the last is there.

        Raises:
            ClosedError: the engine was closed.
        """
        failed: list[Request] = []
        with self._mutex:
            if self.closed:
                raise ClosedError
            for request in requests:
                instance = request.instance
                instance.uses += 1
                if instance.removed or instance.served.error is not None:
                    request.error = unservable(instance)
                    failed.append(request)
            taken = [request for request in requests if request.error is None] if failed else requests
            alarm = self._line.extend(taken)
            self._line.rouse(None if alarm else requests)
        if alarm:
            self.service.poke()
        if failed:
            self._runner.end(failed, self._clock())

    def kick(self, roused: bool = False, refused: bool = False) -> None:
        """Has what is pending sent out, for requests that nobody waits for: by the service thread.

        Where that does not keep up, since the caller has the interpreter most of the time, he sends out what
        can go at once himself, or leaves the interpreter for a moment to who does, and waits for no bundle.

        Args:
            roused: whoever sleeps until companions come has been told of what is pending.
            refused: more was brought than can be served in time.
        """
        with self._mutex:
            if not roused:
                self._line.rouse()
            help_out = self._kicked(refused)
        help_out()

    def _kicked(self, refused: bool) -> Callable[[], object]:
        """What the caller does for what is pending now once he has left the mutex, which is held here."""
        self._driver.interrupt_for(self._line.unkicked())
        self._line.kick()
        me, flooded = threading.current_thread(), self._driver.flooded and self._line.runnable()
        if self._holder is me or not (refused or flooded):
            return self.service.poke
        if flooded and self._holder is None:
            self._holder = me
            return partial(self._help, self._line.pending)
        return self._make_way if refused or not self._driver.resting else self.service.poke

    def _make_way(self) -> None:
        self.service.poke()
        time.sleep(_PAUSE)

    def _help(self, most: int) -> None:
        """Dispatches at most so many requests; an error is theirs, and their futures have it."""
        try:
            self._driver.send(most)
        except BaseException as error:
            self._runner.rescue(error)
            if not isinstance(error, Exception):
                raise
            logger.exception("dispatching failed")
            self.fail_all(error)
        finally:
            self._release()

    def wait(self, requests: Sequence[Request]) -> None:
        """Returns when all of these have gone out, dispatching for everybody if nobody else does."""
        me = threading.current_thread()
        nested = self._holder is me
        waiter: Waiter | None = None
        try:
            while True:
                with self._mutex:
                    left = [request for request in requests if not request.out]
                    if not left:
                        return
                    drive = (nested or self._holder is None) and self._line.runnable()
                    if drive:
                        self._holder = me
                    else:
                        waiter = self._line.line_up(waiter, left)
                        self._driver.interrupt_for(map(self._line.queue_of, left))
                if drive:
                    self._drive_as_holder(left, nested)
                elif waiter is not None and not waiter.block(_LIVENESS):
                    self._check_holder()
        finally:
            if waiter is not None:
                self._step_out(waiter, requests)
            if not nested and self._holder is me:
                self._release()

    def _step_out(self, waiter: Waiter, requests: Sequence[Request]) -> None:
        """A wait is over, perhaps by an exception: a role that was offered to it goes to somebody else."""
        with self._mutex:
            for request in requests:
                if request.waiters:
                    request.waiters = tuple(other for other in request.waiters if other is not waiter)
                    self._line.awaited(request)
            if self._holder is None and waiter.signalled:
                self._hand_on(poke=True)

    def cancel(self, request: Request) -> bool:
        """Takes a request out of the line; False when it has gone out."""
        with self._mutex:
            if request.state is not RequestState.QUEUED or request.error is not None:
                return False
            self._line.take_out([request])
            self._line.rouse()
            request.state = RequestState.CANCELLED
        request.error = CancelledRequest(tenant=request.quota.tenant)
        self._runner.end([request], self._clock())
        return True

    def add_done_callback(self, request: Request, callback: Callable[[Request], object]) -> None:
        """See :meth:`Request.add_done_callback`."""
        if self._runner.add_done_callback(request, callback):
            self.service.poke()

    def configure(self, settings: Settings) -> None:
        """Takes over new settings from the next decision on."""
        with self._mutex:
            self.executor.configure(settings)
            self._driver.configure(settings)
            self._runner.retirement.factor = settings.straggler
            self._line.rouse()

    def catch_up(self) -> None:
        """Counts what the device has finished; while somebody dispatches, he does."""
        if self._take_role():
            try:
                self._runner.land()
            finally:
                self._release()

    def compiled(self, served: ServedProgram) -> None:
        """A program's plan is there, or its error: its requests can go out, or fail."""
        failed: list[Request] = []
        with self._mutex:
            served.ready = True
            if served.error is not None:
                failed = [request for request in self._line.queued() if request.served is served]
                self._line.take_out(failed)
                for request in failed:
                    request.error = failure(served, served.error)
            self._line.wake(served)
            self._driver.interrupt_for(served.queues)
            if not self._line.rouse() and self._holder is None:
                self._hand_on(poke=True)
        if failed:
            self._runner.end(failed, self._clock())

    def prospect(self, served: ServedProgram, quota: Quota) -> Prospect:
        """What requests of that program would be queued behind now."""
        queue = self._line.queue(served, quota)
        limit, untold = max(1, min(self._driver.max_bundle, served.slots)), self._runner.untold(queue.name)
        return Prospect(queue, self.policy, untold, limit, self._mutex)

    def health(self) -> DeviceHealth:
        """How the device is, and what waits for it."""
        with self._mutex:
            arrivals = [request.arrival for request in self._line.queued()]
        return DeviceHealth.of(self.executor, arrivals, self._clock())

    def died(self, instance: Instance) -> None:
        """A model was collected; its row is released when nothing of it is under way. Takes no lock."""
        self._runner.dead.append(instance)
        self.service.poke_from_anywhere()

    def retire(self, instances: Sequence[Instance]) -> None:
        """Marks instances as removed and releases their rows as soon as nothing of them is under way."""
        with self._mutex:
            for instance in instances:
                instance.removed = True
            self._runner.dead.extend(instances)
        if self._take_role():
            self._release()

    def outdated(self, instance: Instance) -> None:
        """The model went on in another form: its row is released as if it had been collected."""
        instance.dropped = True
        self._runner.dead.append(instance)
        self.service.poke()

    # The role.

    def attend(self) -> None:
        """The service thread's turn: everything that can go out, and what has ended.

        While callers keep dispatching they see the ends themselves; a turn then would only contend with them.
        """
        while True:
            with self._mutex:
                now = self._clock()
                urgent = self._runner.watched or self._runner.dead or self._line.alarms.next() <= now
                if 0.0 <= now - self._released < _QUIET and not (urgent or self._line.orphaned()):
                    return
                if self._holder is not None:
                    return
                self._holder = threading.current_thread()
            if not self._drive_as_holder(None, nested=False):
                return
            # Without the role, so that callers can enqueue behind it meanwhile.
            self.executor.await_end(self._driver.interrupt)

    def _take_role(self) -> bool:
        """Takes the role if it is free."""
        with self._mutex:
            if self._holder is not None:
                return False
            self._holder = threading.current_thread()
            return True

    @contextlib.contextmanager
    def _role(self) -> Iterator[None]:
        """Waits for the role and holds it; the holder itself goes on holding it."""
        nested = self._holder is threading.current_thread()
        while not (nested or self._take_role()):
            self._check_holder()
            time.sleep(_PAUSE)
        try:
            yield
        finally:
            if not nested:
                self._release()

    def _drive_as_holder(self, left: Sequence[Request] | None, nested: bool) -> bool:
        """Drives, and returns whether something is under way whose end somebody wants to be told."""
        try:
            self._driver.drive(left)
            return self._runner.watched and self.executor.flying()
        except BaseException as error:
            self._runner.rescue(error)
            raise
        finally:
            if not nested:
                self._release()

    def _release(self) -> None:
        own, released = self.service.is_current(), False
        while not released:
            with self._mutex:
                released = not self._runner.dead
                if released:
                    self._holder = None
                    self._released = float("-inf") if own else self._clock()
                    self._hand_on(poke=not own)
            if not released:
                self._runner.release_rows()
        if not own and self.executor.flying():
            self.service.watch(at_once=self._runner.watched)

    def _hand_on(self, poke: bool) -> None:
        """Offers the free role to a blocked caller, or else to the service thread; the mutex is held."""
        if not self._line.active:
            return
        waiter = self._line.waiter()
        if waiter is not None:
            waiter.signal()
        elif poke and self._line.orphaned():
            self._driver.interrupt.set()  # if that thread waits for the device
            self.service.poke()

    def _check_holder(self) -> None:
        """A holder whose thread ended without a release: its bundle fails, and the role is free again."""
        with self._mutex:
            holder = self._holder
            if holder is None or holder.is_alive():
                return
            self._holder = None
            self._line.get_up()
            stranded = self._runner.stranded()
        self._runner.fail(stranded, RuntimeError(f"thread {holder.name} died while it dispatched"))

    def fail_all(self, error: BaseException, unready_only: bool = False) -> None:
        """Everything pending ends with ``error``, or with it as the cause."""
        with self._mutex:
            requests = self._line.queued(unready_only)
            self._line.take_out(requests)
        self._runner.fail(requests, error)

    def drain(self) -> None:
        """Returns when everything pending has gone out and ended on the device; waits for no companions."""
        with self._mutex:
            self._driver.hold_nothing()
            self._line.let_go()
            self._line.rouse()
            pending = self._line.queued()
        self.wait(pending)
        with self._role():
            while self.executor.flying():
                self.executor.await_end()
                self._runner.land()

    def close(self, timeout: float) -> None:
        """Refuses new requests, drains what can run and stops the service thread."""
        with self._mutex:
            self.closed = True
        self.fail_all(ClosedError(), unready_only=True)
        self.drain()
        self.service.close(timeout)

    def abandon_after_fork(self) -> None:
        """In a forked child: the threads are gone, and with them everything that was pending or under way."""
        self._mutex = threading.Lock()
        self._holder = None
        self.closed = True
        self._line.get_up()
        self._runner.abandon_after_fork(self._mutex)
        self.service.abandon_after_fork()
        error = RuntimeError("it was pending when the process forked")
        self._runner.fail(self._runner.stranded(), error)
        self.fail_all(error)

"""What is pending on one device. Every method is called with the dispatcher's mutex held."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch_mux.runtime.alarms import Alarms
from torch_mux.runtime.queues import ProgramQueue
from torch_mux.runtime.request import Request, RequestState, Waiter
from torch_mux.runtime.scheduler.base import LaneLoad, QueueName, View
from torch_mux.runtime.served import ServedProgram
from torch_mux.types import Quota

__all__ = ["Line", "go_out"]

_NEVER = float("inf")


class Line:
    """The queues of one device's programs, and the thread that sleeps until they fill.

    Attributes:
        active: the queues with pending requests.
        pending: how many requests these have.
        alarms: when holds end and deadlines pass.
    """

    def __init__(self) -> None:
        self.active: dict[ProgramQueue, None] = {}
        self.pending = 0
        self._apart = True
        self.alarms = Alarms()
        self._held: dict[Request, None] = {}
        self._next = 0
        self._kicked = 0
        self._unkicked: dict[ProgramQueue, None] = {}
        self._orphans: dict[ProgramQueue, None] = {}
        self._blocked: dict[ServedProgram, dict[Request, None]] = {}
        self._news: dict[ProgramQueue, None] = {}
        self._turn = 0
        self._nap: tuple[Waiter, Mapping[QueueName, int]] | None = None

    def queue(self, served: ServedProgram, quota: Quota) -> ProgramQueue:
        """Where requests of a program under that quota queue: calls that depend on each other all in one."""
        return served.queues[self._apart and quota.reserve > 0.0 and not served.ordered]

    def queue_of(self, request: Request) -> ProgramQueue:
        """The queue of a request."""
        return self.queue(request.served, request.quota)

    def keep_apart(self, apart: bool) -> None:
        """Whether tenants with a reserve have queues of their own from now on; what is pending moves."""
        if apart == self._apart:
            return
        pending = sorted(
            [request for queue in self.active for request in queue.requests], key=lambda one: one.seq
        )
        for request in pending:
            self._remove((request,))
        self._apart = apart
        for request in pending:
            self._append(request)
            if request.seq < self._kicked:
                self._orphans[self.queue_of(request)] = None

    def _append(self, request: Request) -> None:
        queue = self.queue_of(request)
        pending = queue.requests
        pending.append(request)
        self.pending += 1
        self._unkicked[queue] = None
        if pending.stirred:
            self._stirred(queue)
        if request.waiters:
            self.awaited(request)

    def view(self, loads: Sequence[LaneLoad]) -> View:
        """What a policy sees; :meth:`seen` when it has."""
        return View(self.active.keys(), loads, None, self._news.keys())

    def seen(self) -> None:
        """The policy knows of what is new."""
        self._news.clear()

    def extend(self, requests: Sequence[Request]) -> bool:
        """Queues requests behind all others, or holds them; returns whether the next alarm is sooner now."""
        before = self.alarms.peek()
        served: ServedProgram | None = None
        quota: Quota | None = None
        runs: list[tuple[ProgramQueue, list[Request]]] = []
        first, self._next = self._next, self._next + len(requests)
        for number, request in enumerate(requests, first):
            request.seq = number
            if request.expires < _NEVER:
                self.alarms.set(request.expires, request)
            if request.eligible > request.arrival:
                self._held[request] = None
                self.alarms.set(request.eligible, request)
                continue
            if request.instance.served is not served or request.quota is not quota:
                served, quota = request.instance.served, request.quota
                runs.append((self.queue(served, quota), []))
            runs[-1][1].append(request)
        for queue, run in runs:
            queue.requests.extend(run)
            self.pending += len(run)
            self._unkicked[queue] = None
            if queue.requests.stirred:
                self._stirred(queue)
        return self.alarms.peek() < before

    def _stirred(self, queue: ProgramQueue) -> None:
        queue.requests.stirred = False
        self.active[queue] = self._news[queue] = None

    def ring(self, now: float) -> list[Request]:
        """Lets those go whose hold is over; takes out and returns those whose deadline has passed."""
        expired: list[Request] = []
        for request in self.alarms.ring(now) if self.alarms else ():
            if request.state is not RequestState.QUEUED:
                continue  # both of its alarms rang
            if request.expires <= now:
                self.take_out((request,))
                request.state = RequestState.EXPIRED
                expired.append(request)
            elif request in self._held:
                self._let_go(request)
        return expired

    def let_go(self) -> None:
        """No request is held any longer."""
        for request in list(self._held):
            self._let_go(request)

    def _let_go(self, request: Request) -> None:
        del self._held[request]
        kicked = request.seq < self._kicked
        request.seq = self._next
        self._next += 1
        self._append(request)
        if kicked:
            self.kick()

    def put_back(self, requests: Sequence[Request]) -> None:
        """Requests that had been taken out become the oldest of their queues again."""
        for request in reversed(requests):
            request.state = RequestState.QUEUED
            queue = self.queue_of(request)
            queue.requests.appendleft(request)
            self.pending += 1
            self.active[queue] = self._news[queue] = self._unkicked[queue] = None
            self.awaited(request)
            if request.expires < _NEVER:
                self.alarms.set(request.expires, request)
        self.kick()

    def take_out(self, requests: Sequence[Request]) -> None:
        """Removes pending requests; from then on nobody else may end them."""
        for request in requests:
            request.state = RequestState.RUNNING
            if request in self._held:
                del self._held[request]
                self.alarms.forget((request,))
            elif request in self.queue_of(request).requests:
                self.take_bundle((request,))

    def take_bundle(self, requests: Sequence[Request]) -> None:
        """Removes pending requests of one queue; they leave the line."""
        self._remove(requests)
        self.alarms.forget(requests)

    def send_out(self, requests: Sequence[Request], now: float) -> None:
        """A bundle of one queue goes out; how fast that goes is learned where somebody asks."""
        queue = self.queue_of(requests[0])
        self.take_bundle(requests)
        if queue.asked:
            queue.pace.issued(len(requests), len(queue.requests), self._turn, now)
        self._turn += 1

    def rested(self) -> None:
        """There was nothing to send out, or it was held for others."""
        self._turn += 1

    def ended(self, requests: Sequence[Request], now: float) -> None:
        """A bundle has ended."""
        first = requests[0]
        queue = self.queue_of(first)
        if queue.asked:
            queue.pace.ended(len(requests), now - first.started)

    def _remove(self, requests: Sequence[Request]) -> None:
        queue = self.queue_of(requests[0])
        queue.requests.take(requests)
        self.pending -= len(requests)
        if not queue.requests:
            self.active.pop(queue, None)
        if queue.served in self._blocked:
            for request in requests:
                self._no_longer(request)

    def queued(self, unready_only: bool = False) -> list[Request]:
        """Everything pending, or what waits for its plan."""
        queued = [*self._held, *[request for queue in self.active for request in queue.requests]]
        return [request for request in queued if not (unready_only and request.served.ready)]

    def runnable(self) -> bool:
        """Whether a request with a plan is pending."""
        return any(queue.ready for queue in self.active)

    def kick(self) -> None:
        """What is pending now goes out even if nobody waits for it."""
        self._kicked = self._next
        self._orphans.update(self._unkicked)
        self._unkicked.clear()

    def unkicked(self) -> Collection[ProgramQueue]:
        """Where requests came since the last kick."""
        return self._unkicked.keys()

    def orphaned(self) -> bool:
        """Whether a kicked request with a plan is pending."""
        for queue in list(self._orphans):
            if not queue.requests or queue.requests.oldest.seq >= self._kicked:
                del self._orphans[queue]
            elif queue.ready:
                return True
        return False

    def awaited(self, request: Request) -> None:
        """A thread is blocked until a request has gone out, or no longer is."""
        if request.waiters and request in self.queue_of(request).requests:
            self._blocked.setdefault(request.served, {})[request] = None
        else:
            self._no_longer(request)

    def _no_longer(self, request: Request) -> None:
        blocked = self._blocked.get(request.served)
        if blocked is not None:
            blocked.pop(request, None)
            if not blocked:
                del self._blocked[request.served]

    def waiter(self) -> Waiter | None:
        """A blocked thread whose request can go out; that which blocked first of a program."""
        for served, blocked in self._blocked.items():
            if served.ready:
                return next(iter(blocked)).waiters[0]
        return None

    def wake(self, served: ServedProgram) -> None:
        """Wakes a thread that is blocked for a program's requests."""
        blocked = self._blocked.get(served)
        if blocked:
            next(iter(blocked)).waiters[0].signal()

    def line_up(self, waiter: Waiter | None, left: Sequence[Request]) -> Waiter:
        """Registers a thread that is about to block until these have gone out."""
        if waiter is None:
            waiter = Waiter()
            for request in left:
                request.waiters = (*request.waiters, waiter)
                self.awaited(request)
        else:
            waiter.rearm()
        waiter.left = len(left)
        return waiter

    def lie_down(self, wake: Mapping[QueueName, int]) -> Waiter:
        """The caller will sleep until a queue outside ``wake`` fills, or one in it has so many requests."""
        waiter = Waiter()
        self._nap = (waiter, wake)
        return waiter

    def get_up(self) -> None:
        """The sleeper woke."""
        self._nap = None

    def rouse(self, requests: Sequence[Request] | None = None) -> bool:
        """Wakes the sleeper if these new requests (None: whatever) concern it; returns whether one sleeps."""
        if self._nap is None:
            return False
        waiter = self._nap[0]
        if requests is None or any(map(self._wakes, requests)):
            waiter.signal()
        return True

    def _wakes(self, request: Request) -> bool:
        """Whether the sleeper waits for this one, which is pending or held."""
        assert self._nap is not None
        queue = self.queue_of(request)
        return queue.ready and len(queue.requests) >= self._nap[1].get(queue.name, 1)


def go_out(requests: Sequence[Request]) -> None:
    """Marks requests as out and wakes those who wait for them; the mutex is held."""
    for request in requests:
        if request.out:
            continue
        request.out = True
        if request.waiters:
            _tell(request)


def _tell(request: Request) -> None:
    for waiter in request.waiters:
        waiter.left -= 1
        if waiter.left <= 0:
            waiter.signal()
    request.waiters = ()

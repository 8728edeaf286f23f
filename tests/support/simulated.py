"""Requests, queues and a device of a virtual clock, for the scheduling policies."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from types import SimpleNamespace

from torch_mux.runtime.scheduler.base import Busy, Issue, LaneKind, LaneLoad, Later, Policy, View
from torch_mux.runtime.scheduler.pending import Flow, Pending
from torch_mux.settings import Settings
from torch_mux.types import Quota

__all__ = ["IDLE", "Device", "Queue", "Ticket"]

IDLE = (LaneLoad(),)


@dataclass(eq=False)
class Ticket:
    """A request as a policy sees it."""

    arrival: float
    client: int
    quota: Quota = field(default_factory=Quota)
    seq: int = 0
    key: str = ""
    due: float = float("inf")


class Queue:
    """A queue as a policy sees it; ``requests`` may be added to and taken from."""

    def __init__(
        self,
        key: str,
        requests: Sequence[Ticket] = (),
        ready: bool = True,
        slots: int = 1 << 20,
        ordered: bool = False,
        reserved: bool = False,
    ) -> None:
        self.key, self.ready, self.slots, self.ordered, self.reserved = key, ready, slots, ordered, reserved
        self.program = SimpleNamespace(name=key)
        self.requests: Pending[Ticket] = Pending()
        self.add(*requests)

    def add(self, *requests: Ticket) -> None:
        for request in requests:
            self.requests.append(request)

    @property
    def timed(self) -> bool:
        return self.requests.timed

    @property
    def due(self) -> float:
        return self.requests.due

    def flows(self) -> Mapping[Flow, Collection[Ticket]]:
        return self.requests.flows()

    def fresh(self) -> Sequence[Flow]:
        return self.requests.fresh()


class Device:
    """A dispatcher and a device on a virtual clock: what is submitted goes out as the policy says.

    Args:
        policy: under test.
        seconds: device seconds of a bundle, of its program and slots.
        branches: each lane is a branch, and programs have homes.
    """

    def __init__(
        self,
        policy: Policy,
        settings: Settings,
        seconds: Callable[[str, int], float],
        lanes: int = 1,
        branches: bool = False,
    ) -> None:
        self.branches = branches
        self.policy, self.settings, self.seconds = policy, settings, seconds
        self.now = 0.0
        self.queues: dict[str, Queue] = {}
        self.issues: list[Issue] = []
        self._seq = count()
        self._lanes = [0] * lanes
        self._free = [0.0] * lanes
        self._ends: list[tuple[float, int, int, Issue, float]] = []

    def submit(self, key: str, quota: Quota, client: int = 0) -> Ticket:
        ticket = Ticket(self.now, client, quota, next(self._seq), key)
        self.queues.setdefault(key, Queue(key)).add(ticket)
        return ticket

    def view(self) -> View:
        pending = [queue for queue in self.queues.values() if queue.requests]
        fresh = [queue for queue in pending if queue.requests.stirred]
        for queue in fresh:
            queue.requests.stirred = False
        return View(pending, self.loads(), None, fresh)

    def loads(self) -> list[LaneLoad]:
        if not self.branches:
            return [LaneLoad(bundles) for bundles in self._lanes]
        return [LaneLoad(bundles, LaneKind.COMMON, index) for index, bundles in enumerate(self._lanes)]

    def dispatch(self) -> float:
        """Sends out what may go out now; returns when something will change by itself."""
        until = float("inf")
        while True:
            view = self.view()
            if not view.queues:
                break
            decision = self.policy.form(view, self.now, self.settings)
            if not isinstance(decision, Issue):
                assert isinstance(decision, (Later, Busy)), "something is pending and nothing happens"
                assert isinstance(decision, Later) or self._ends, "nothing is under way to wait for"
                if isinstance(decision, Later):
                    until = decision.until
                elif decision.until is not None:
                    # Who is overdue by more than the linger is not waited for.
                    overdue = decision.until + self.settings.linger
                    until = overdue if overdue > self.now else until
                break
            self._issue(decision)
        return min(until, self._ends[0][0] if self._ends else float("inf"))

    def _issue(self, issue: Issue) -> None:
        taken = [request for request in issue.requests if isinstance(request, Ticket)]
        assert 1 <= len(taken) <= self.settings.max_bundle
        self.queues[issue.key].requests.take(taken)
        self.policy.issued(issue, self.now)
        self.issues.append(issue)
        lane = issue.lane
        assert self._lanes[lane] < self.settings.in_flight
        self._lanes[lane] += 1
        seconds = self.seconds(issue.key, len(taken))
        self._free[lane] = max(self._free[lane], self.now) + seconds
        heappush(self._ends, (self._free[lane], len(self.issues), lane, issue, seconds))

    def advance(self, until: float) -> Iterator[Issue]:
        """The clock goes to ``until``, over every end on the way; yields what ended."""
        while True:
            wake = self.dispatch()
            if wake > until:
                break
            self.now = max(self.now, wake)
            while self._ends and self._ends[0][0] <= self.now:
                _, _, lane, issue, seconds = heappop(self._ends)
                self._lanes[lane] -= 1
                self.policy.completed(issue, self.now, seconds)
                yield issue
        self.now = max(self.now, until)

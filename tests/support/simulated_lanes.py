"""A device with several lanes on a virtual clock: bundles that overlap share it by their caps."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush

from simulated import Queue, Ticket

from torch_mux.runtime.scheduler.base import Issue, LaneKind, LaneLoad, Later, View, lane_kinds
from torch_mux.runtime.scheduler.isolation import IsolatingPolicy
from torch_mux.settings import Settings
from torch_mux.types import Quota

__all__ = ["LanedDevice", "poisson"]

_NEVER = float("inf")
_SLACK = 1e-12


def poisson(seed: int, rate: float, until: float, start: float = 0.0) -> list[float]:
    draw, moments, now = random.Random(seed), [], start
    while (now := now + draw.expovariate(rate)) < until:
        moments.append(now)
    return moments


@dataclass(eq=False)
class Running:
    """A bundle on a lane, with the seconds that it would still take on the whole device."""

    issue: Issue
    issued: float
    left: float
    began: float = _NEVER
    segment: float = _NEVER  # what is left of it until others may go first
    paused: float = 0.0


@dataclass
class LanedDevice:
    """The reserved lane runs at its cap, the others at theirs or at what it leaves them.

    At worst a bundle that overtakes gets nothing before those under way have come to the end of a segment;
    there they stop for it.

    Attributes:
        work: seconds of a bundle on the whole device, of its program and slots.
        latencies, waits: of the requests that ended, by tenant; a wait ends when the request goes out.
        served: seconds of the whole device, by tenant.
        ended: every bundle that ended, with when it began and ended.
    """

    settings: Settings
    work: Callable[[str, int], float]
    now: float = 0.0
    policy: IsolatingPolicy = field(default_factory=IsolatingPolicy)
    issues: list[tuple[float, Issue]] = field(default_factory=list)
    latencies: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    waits: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    served: Counter[str] = field(default_factory=Counter)
    ended: list[tuple[Issue, float, float]] = field(default_factory=list)
    on_end: Callable[[Ticket], object] = lambda ticket: None

    def __post_init__(self) -> None:
        self.kinds = lane_kinds(self.settings)
        self.lanes: list[list[Running]] = [[] for _ in self.kinds]
        self.queues: dict[tuple[str, bool], Queue] = {}
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._number = 0

    def at(self, moment: float, action: Callable[[], object]) -> None:
        self._number += 1
        heappush(self._events, (moment, self._number, action))

    def submit(self, key: str, quota: Quota, client: int = 0) -> Ticket:
        self._number += 1
        ticket = Ticket(self.now, client, quota, self._number, key)
        reserved = self.settings.isolation != "off" and quota.reserve > 0.0
        self.queues.setdefault((key, reserved), Queue(key, reserved=reserved)).add(ticket)
        return ticket

    def saturate(self, key: str, quota: Quota, depth: int) -> None:
        """So many of its requests are always pending or under way; ``on_end`` is used for it."""
        before = self.on_end

        def again(ticket: Ticket) -> None:
            before(ticket)
            if (ticket.key, ticket.quota.tenant) == (key, quota.tenant):
                self.submit(key, quota, hash(quota.tenant))

        self.on_end = again
        for _ in range(depth):
            self.submit(key, quota, hash(quota.tenant))

    def _speeds(self) -> list[tuple[Running, float]]:
        heads = [(kind, lane[0]) for kind, lane in zip(self.kinds, self.lanes, strict=True) if lane]
        passing = [one for kind, one in heads if kind is LaneKind.PASSING]
        for _, one in heads:
            if one.segment <= _SLACK and not passing:
                one.segment = self.settings.segment or _NEVER
        if passing:
            running = [(kind, one) for kind, one in heads if one not in passing and one.segment > _SLACK]
            stopped = not any(kind is not LaneKind.RESERVED for kind, _ in running)
            heads = [*running, (LaneKind.PASSING, passing[0])] if stopped else running
        own = [one for kind, one in heads if kind is LaneKind.RESERVED]
        left = 1.0 - sum(one.issue.share for one in own)
        others = [one for kind, one in heads if kind is not LaneKind.RESERVED]
        asked = sum(one.issue.share for one in others)
        scale = min(1.0, max(left, 0.01) / asked) if others else 1.0
        return [(one, one.issue.share) for one in own] + [(one, one.issue.share * scale) for one in others]

    def _dispatch(self) -> float:
        while True:
            pending = [queue for queue in self.queues.values() if queue.requests]
            pending.sort(key=lambda queue: queue.requests.oldest.seq)
            lanes = [LaneLoad(len(lane), kind) for lane, kind in zip(self.lanes, self.kinds, strict=True)]
            decision = self.policy.form(View(pending, lanes), self.now, self.settings)
            if not isinstance(decision, Issue):
                return decision.until if isinstance(decision, Later) else _NEVER
            taken = [ticket for ticket in decision.requests if isinstance(ticket, Ticket)]
            self.queues[decision.key, decision.reserved].requests.take(taken)
            self.policy.issued(decision, self.now)
            self.issues.append((self.now, decision))
            for ticket in taken:
                self.waits[ticket.quota.tenant].append(self.now - ticket.arrival)
            assert len(self.lanes[decision.lane]) < self.settings.in_flight
            made = Running(decision, self.now, self.work(decision.key, len(taken)))
            if self.kinds[decision.lane] in (LaneKind.COMMON, LaneKind.CONFINED):
                made.segment = 0.0 if self.settings.segment else _NEVER  # there is a stop before the first
            self.lanes[decision.lane].append(made)

    def run(self, until: float) -> None:
        while self.now < until:
            wake = self._dispatch()
            speeds = self._speeds()
            for one, _ in speeds:
                one.began = min(one.began, self.now)
            moments = [self.now + min(one.left, one.segment) / speed for one, speed in speeds]
            moments += [wake + 1e-9, until] + [moment for moment, *_ in self._events[:1]]
            moment = min(moments)
            for one, speed in speeds:
                done = min(one.left, (moment - self.now) * speed)
                one.left -= done
                one.segment -= done
                for ticket in one.issue.requests:
                    self.served[ticket.quota.tenant] += done / len(one.issue.requests)  # type: ignore[assignment]
            running = {id(one) for one, _ in speeds}
            for lane in self.lanes:
                if lane and lane[0].began < _NEVER and id(lane[0]) not in running:
                    lane[0].paused += moment - self.now
            self.now = max(self.now, moment)
            for lane in self.lanes:
                while lane and lane[0].left <= _SLACK:
                    self._land(lane.pop(0))
            while self._events and self._events[0][0] <= self.now:
                heappop(self._events)[2]()

    def _land(self, one: Running) -> None:
        self.policy.completed(one.issue, self.now, self.now - one.began - one.paused)
        self.ended.append((one.issue, one.began, self.now))
        for ticket in one.issue.requests:
            assert isinstance(ticket, Ticket)
            self.latencies[ticket.quota.tenant].append(self.now - ticket.arrival)
            self.on_end(ticket)

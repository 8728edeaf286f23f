"""Line, admission, accounting and policy on a virtual clock, with a device that has faults."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from types import SimpleNamespace
from typing import Any

from torch_mux.errors import DeadlineExceeded, MuxError
from torch_mux.runtime.accounting import Accounting
from torch_mux.runtime.admission import Admission
from torch_mux.runtime.line import Line
from torch_mux.runtime.outlook import Outlook, Prospect
from torch_mux.runtime.queues import ProgramQueue
from torch_mux.runtime.request import Request, RequestState
from torch_mux.runtime.scheduler.base import Issue, LaneKind, LaneLoad, Later, lane_kinds
from torch_mux.runtime.scheduler.isolation import IsolatingPolicy
from torch_mux.settings import Settings
from torch_mux.types import Quota

__all__ = ["Day", "bursts"]

_NEVER = float("inf")


def bursts(draw: random.Random, mean: float, until: float, cv: float = 4.0) -> list[float]:
    """Arrivals with Gamma gaps of that mean and coefficient of variation, from 0 to ``until``."""
    shape, moments, now = 1 / cv**2, [], 0.0
    while (now := now + draw.gammavariate(shape, mean / shape)) < until:
        moments.append(now)
    return moments


class Program:
    """What the line knows of a served program."""

    work = 1
    slots = 1 << 20
    ordered = False

    def __init__(self, key: str) -> None:
        self.key, self.ready = key, True
        self.program = SimpleNamespace(name=key)
        served: Any = self
        self.queues = (ProgramQueue(served, False), ProgramQueue(served, True))


@dataclass
class Day:
    """Everything but the threads.

    Attributes:
        seconds: device seconds of a bundle on the whole device, of its program and slots.
        faulty: whether a bundle of a program raises; each of its requests runs again alone then.
        guilty: whether a request raises even alone.
        slower: factor on the time of a bundle.
        sending: host seconds that a bundle of so many slots takes before it is enqueued.
        submitting, refusing: host seconds of a request that is accepted, and of one that is not.
        on_end: called with each request that ended.
        skew: what the clock shows beyond the true time.
        latest: the latest that the clock has shown.
    """

    settings: Settings
    seconds: Callable[[str, int], float]
    faulty: Callable[[str], bool] = lambda key: False
    guilty: Callable[[], bool] = lambda: False
    slower: Callable[[], float] = lambda: 1.0
    sending: Callable[[int], float] = lambda slots: 0.0
    submitting: float = 0.0
    refusing: float = 0.0
    on_end: Callable[[Request], object] = lambda request: None
    on_issue: Callable[[Issue, float], object] = lambda issue, seconds: None
    now: float = 0.0
    skew: float = 0.0
    latest: float = 0.0
    busy: float = 0.0
    busy_of: Counter[LaneKind] = field(default_factory=Counter)
    policy: IsolatingPolicy = field(default_factory=IsolatingPolicy)
    accounting: Accounting = field(default_factory=Accounting)
    line: Line = field(default_factory=Line)
    programs: dict[str, Program] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.admission = Admission(self.accounting)
        self._kinds = lane_kinds(self.settings)
        self.line.keep_apart(self.settings.isolation != "off")
        self._load = [0] * len(self._kinds)
        self._free = [0.0] * len(self._kinds)
        self._ends: list[tuple[float, int, Issue, float]] = []
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = iter(range(1 << 60))

    @property
    def clock(self) -> float:
        return self.now + self.skew

    def at(self, moment: float, action: Callable[[], object]) -> None:
        """Does something at a true time."""
        heappush(self._events, (moment, next(self._numbers), action))

    def program(self, key: str) -> Program:
        found = self.programs.get(key)
        if found is None:
            found = self.programs[key] = Program(key)
        return found

    def submit(self, key: str, quota: Quota, client: int = 0) -> Request | None:
        program: Any = self.program(key)
        queue = self.line.queue(program, quota)
        self.latest = max(self.latest, self.clock)

        prospect = Prospect(queue, self.policy, 0, self.settings.max_bundle, threading.Lock())
        outlook = Outlook(lambda index: prospect, lambda index: quota, 1, self.clock)
        try:
            waits = self.admission.admit([quota], self.clock, outlook.late)
        except MuxError:
            self.refused[quota.tenant] += 1
            self.now += self.refusing
            return None
        self.now += self.submitting
        instance: Any = SimpleNamespace(served=program)
        dispatcher: Any = None
        request = Request(dispatcher, instance, (), [], quota, True, self.clock, client)
        request.eligible += waits[0] if waits is not None else 0.0
        if waits is None:
            request.foreseen = outlook.foreseen.get(0)
        self.line.extend([request])
        self.requests.append(request)
        return request

    def cancel(self, request: Request) -> None:
        if request.state is RequestState.QUEUED:
            self.line.take_out([request])
            request.state = RequestState.CANCELLED
            self._end([request])

    def run(self, until: float = _NEVER) -> None:
        """Goes on until a true time, or until nothing happens any more."""
        idle = 0  # turns at one moment: a policy that waits for the past would never end
        while True:
            idle += 1
            assert idle < 10_000, "time stands still"
            wake = self._dispatch()
            moments = [end for end, *_ in self._ends[:1]] + [moment for moment, *_ in self._events[:1]]
            # A nanosecond more: the difference may be rounded to just before the moment.
            moments += [
                moment - self.skew + 1e-9 for moment in (wake, self.line.alarms.next()) if moment < _NEVER
            ]
            moment = min(moments, default=_NEVER)
            if moment >= until or moment == _NEVER:
                self.now = max(self.now, until) if until < _NEVER else self.now
                return
            if moment > self.now:
                self.now, idle = moment, 0
            while self._ends and self._ends[0][0] <= self.now:
                self._land(*heappop(self._ends)[2:])
            self._arrive()

    def _arrive(self) -> None:
        """Does what is due by now."""
        now = self.now  # it takes time itself
        while self._events and self._events[0][0] <= now:
            heappop(self._events)[2]()

    def _dispatch(self) -> float:
        """Sends out what may go out; returns until when the policy waits."""
        while True:
            self.latest = max(self.latest, self.clock)
            expired = self.line.ring(self.clock)
            for request in expired:
                request.error = DeadlineExceeded(tenant=request.quota.tenant, deadline=1.0)
            self._end(expired)
            lanes = [LaneLoad(load, kind) for load, kind in zip(self._load, self._kinds, strict=True)]
            view = self.line.view(lanes)
            if not view.queues:
                self.line.rested()
            decision = self.policy.form(view, self.clock, self.settings)
            self.line.seen()
            if not isinstance(decision, Issue):
                common = [lane.bundles for lane in lanes if lane.kind is LaneKind.COMMON]
                room = min(common) < self.settings.in_flight
                waits = [queue for queue in view.queues if queue.ready]
                assert not (waits and room and decision is None), "something can run and nothing happens"
                return decision.until if isinstance(decision, Later) else _NEVER
            self._issue(decision)

    def _issue(self, issue: Issue) -> None:
        requests: Any = list(issue.requests)
        assert 1 <= len(requests) <= self.settings.max_bundle
        self.line.send_out(requests, self.clock)
        for request in requests:
            assert request.state is RequestState.QUEUED
            assert request.eligible <= self.latest
            assert self.clock < request.expires
            request.state, request.started = RequestState.RUNNING, self.clock
        self.policy.issued(issue, self.clock)
        self.now += self.sending(len(requests))
        seconds = self.seconds(issue.key, len(requests)) * self.slower() / issue.share
        lane = issue.lane
        assert self._load[lane] < self.settings.in_flight
        self._load[lane] += 1
        self._free[lane] = max(self._free[lane], self.now) + seconds
        heappush(self._ends, (self._free[lane], next(self._numbers), issue, seconds))
        self.on_issue(issue, seconds)
        self._arrive()

    def _land(self, issue: Issue, seconds: float) -> None:
        self._load[issue.lane] -= 1
        if len(issue.requests) > 1 and self.faulty(issue.key):
            self.policy.completed(issue, self.clock, 0.0)
            for request in issue.requests:
                self._settle(replace(issue, requests=(request,)), self.seconds(issue.key, 1))
        else:
            self._settle(issue, seconds)

    def _settle(self, issue: Issue, seconds: float) -> None:
        requests: Any = list(issue.requests)
        self.policy.completed(issue, self.clock, seconds)
        self.line.ended(requests, self.clock)
        self.accounting.ran(requests, seconds, True)
        self.busy += seconds
        self.busy_of[self._kinds[issue.lane]] += seconds  # type: ignore[assignment]
        for request in requests:
            if self.guilty():
                request.error = ValueError("of its own")
        self._end(requests)

    def _end(self, requests: list[Request]) -> None:
        for request in requests:
            if request.state is RequestState.RUNNING:
                request.state = RequestState.DONE if request.error is None else RequestState.ERROR
        self.accounting.ended(requests, self.clock)
        for request in requests:
            request.out = True
            self.on_end(request)

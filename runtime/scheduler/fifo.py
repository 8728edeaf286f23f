"""First come, first served, by program: the oldest request goes out, and all its companions with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from torch_mux.runtime.scheduler.base import (
    Busy,
    Decision,
    Issue,
    LaneLoad,
    Later,
    Queue,
    Ticket,
    View,
    share_of,
)
from torch_mux.settings import Settings

__all__ = ["FifoPolicy"]

_MOST_MISSES = 6
_NEVER = float("inf")


@dataclass
class _Cohort:
    """The clients of a program's last bundle, who may be back at once if they call in a closed loop."""

    clients: frozenset[int] = field(default_factory=frozenset)
    under_way: int = 0
    ended: float = float("-inf")
    seconds: float = 0.0
    misses: int = 0
    skip: int = 0


class FifoPolicy:
    """FIFO by program with an adaptive linger.

    Nothing waits while the device is idle, with two exceptions. ``max_wait`` holds a request for companions.
    And when several clients shared the last bundle of a program and some of them are not back, their cohort
    is awaited: while the device is busy with it, and then for at most ``linger`` seconds or the duration of
    that bundle. Without it closed-loop clients split into two cohorts that take turns. A client alone is
    never held, and clients who stop coming back are awaited less and less often.
    """

    def __init__(self) -> None:
        self._cohorts: dict[str, _Cohort] = {}

    def form(self, view: View, now: float, settings: Settings) -> Decision:
        """The oldest request that can go out, with those of its program up to ``max_bundle``."""
        until = _NEVER
        wake: dict[str, int] = {}
        held = full = False
        for queue in view.queues:
            if not queue.ready:
                continue
            lane = _lane(view.lanes, queue.ordered, settings)
            if lane is None:
                full = True
                continue
            limit, count = max(1, min(settings.max_bundle, queue.slots)), len(queue.requests)
            if count < limit:
                awaited = self._awaited(queue, now, settings)
                if awaited is not None:
                    moment, missing = awaited
                    wake[queue.key] = min(limit, count + missing)
                    held = held or moment is None
                    until = until if moment is None else min(until, moment)
                    continue
            requests = tuple(islice(queue.requests, limit))
            return Issue(queue.key, requests, share_of(requests), lane)
        if until < _NEVER:
            return Later(until, wake)
        if held:
            return Busy(wake)
        return Busy() if full else None

    def _awaited(self, queue: Queue, now: float, settings: Settings) -> tuple[float | None, int] | None:
        """(until when, how many) companions to wait for; no time: until their bundle has ended."""
        if queue.slots == 1:
            return None
        moment = queue.requests[0].arrival + settings.max_wait
        if settings.max_wait > 0.0 and now < moment:
            return moment, settings.max_bundle
        cohort = self._cohorts.get(queue.key)
        if cohort is None or cohort.skip or len(cohort.clients) < 2 or settings.linger <= 0.0:
            return None
        moment = cohort.ended + min(settings.linger, cohort.seconds)
        if cohort.under_way == 0 and now >= moment:
            return None
        missing = _missing(cohort, queue.requests)
        if not missing:
            return None
        return (None if cohort.under_way else moment), missing

    def issued(self, issue: Issue, now: float) -> None:
        """Learns whether the cohort came back, and takes the bundle's clients as the next one."""
        cohort = self._cohorts.get(issue.key)
        if cohort is None:
            cohort = self._cohorts[issue.key] = _Cohort()
        if cohort.skip:
            cohort.skip -= 1
        elif len(cohort.clients) > 1:
            cohort.misses = min(_MOST_MISSES, cohort.misses + 1) if _missing(cohort, issue.requests) else 0
            cohort.skip = (1 << (cohort.misses - 1)) - 1 if cohort.misses else 0
        cohort.clients = frozenset([request.client for request in issue.requests])
        cohort.under_way += 1

    def completed(self, key: str, now: float, seconds: float) -> None:
        """Starts the linger of that program's cohort."""
        cohort = self._cohorts.get(key)
        if cohort is not None:
            cohort.under_way = max(0, cohort.under_way - 1)
            cohort.ended = now
            cohort.seconds = seconds

    def forget(self, key: str) -> None:
        """Drops what is known of a program's clients."""
        self._cohorts.pop(key, None)


def _missing(cohort: _Cohort, requests: Sequence[Ticket]) -> int:
    return len(cohort.clients.difference([request.client for request in requests]))


def _lane(lanes: Sequence[LaneLoad], ordered: bool, settings: Settings) -> int | None:
    """The least loaded lane with room, or None."""
    best = 0
    if not ordered:
        for lane, load in enumerate(lanes):
            if load.bundles < lanes[best].bundles:
                best = lane
    return best if lanes[best].bundles < settings.in_flight else None

"""The policy: who goes out next, by class and fair share, with companions of the same program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
from torch_mux.runtime.scheduler.cohorts import Cohorts
from torch_mux.runtime.scheduler.fair import Account, VirtualTime
from torch_mux.runtime.scheduler.formation import Turns
from torch_mux.runtime.scheduler.pending import Flow
from torch_mux.runtime.scheduler.predictor import Predictor
from torch_mux.settings import Settings
from torch_mux.types import Quota

__all__ = ["FairPolicy"]

_NEVER = float("inf")


class _Open(NamedTuple):
    """A queue that a bundle may be made of now."""

    queue: Queue
    lane: int
    limit: int


@dataclass
class _Charge:
    """What the tenants of a bundle under way were charged before its time was known."""

    each: float
    units: dict[Account, float]


class FairPolicy:
    """Weighted fair by device seconds, by program.

    While everything that is pending and can run fits one bundle, it goes out at once, in order of arrival,
    but for the holds of :class:`Cohorts`. Where something has to stay behind, the order is: priority class,
    least start tag (:class:`VirtualTime`), age. The first in that order names the program. His companions of
    the same program go with him in the same order, except who is further ahead than the *allowance* of those
    who wait for another program: the time of one such bundle. The device is never left idle for the sake of
    an order.

    *Lag.* Let two tenants f and g of one class have something pending, in programs whose plans are there, at
    every decision of an interval. Then the device seconds W that they are charged in it satisfy
    ``|W_f / w_f - W_g / w_g| <= B_f + B_g``, where ``B_x = (A + c_x) / w_x + E``: w are the weights, A is the
    longest forecast of a bundle, c_x the most that one slot of x is charged, and E the most by which the
    forecasts of the bundles under way are off, over the smallest weight. For one program with forecasts that
    come true this is the bound of start-time fair queueing, ``c_f / w_f + c_g / w_g``.
    """

    def __init__(self, predictor: Predictor | None = None) -> None:
        self.predictor = Predictor() if predictor is None else predictor
        self._cohorts = Cohorts()
        self._times: dict[int, VirtualTime] = {}
        self._turns: dict[str, Turns] = {}
        self._flying: dict[Issue, _Charge] = {}

    def form(self, view: View, now: float, settings: Settings) -> Decision:
        """The bundle of whoever is first, or how long to wait."""
        until = _NEVER
        wake: dict[str, int] = {}
        held = full = False
        ready: list[Queue] = []
        choices: list[_Open] = []
        free, first_lane = _lane(view.lanes, False, settings), _lane(view.lanes, True, settings)
        for queue in view.queues:
            if not queue.ready:
                continue
            ready.append(queue)
            lane = first_lane if queue.ordered else free
            if lane is None:
                full = True
                continue
            limit, count = max(1, min(settings.max_bundle, queue.slots)), len(queue.requests)
            awaited = self._cohorts.awaited(queue, now, settings) if count < limit else None
            if awaited is None:
                choices.append(_Open(queue, lane, limit))
                continue
            moment, missing = awaited
            wake[queue.key] = min(limit, count + missing)
            held = held or moment is None
            until = until if moment is None else min(until, moment)
        if choices:
            first = choices[0]
            if len(ready) == 1 and len(first.queue.requests) <= first.limit:
                return _issue(first, tuple(first.queue.requests), view.lanes, None)
            return self._contended(ready, choices, view.lanes)
        if until < _NEVER:
            return Later(until, wake)
        if held:
            return Busy(wake)
        return Busy() if full else None

    def _contended(
        self, ready: Sequence[Queue], choices: Sequence[_Open], lanes: Sequence[LaneLoad]
    ) -> Issue:
        """Something stays behind: the fair order says what."""
        waiting = {queue.key: self._turns_of(queue).least(self._arrived) for queue in ready}
        chosen, rank = choices[0], (0, _NEVER, 0)
        for choice in choices:
            least = waiting[choice.queue.key]
            priority = max(least)
            mine = (-priority, *least[priority])
            if choice is chosen or mine < rank:
                chosen, rank = choice, mine
        key, priority = chosen.queue.key, -rank[0]
        ceilings: dict[int, float] = {}
        for other, least in waiting.items():
            if other != key:
                for level, (tag, _) in least.items():
                    if tag < ceilings.get(level, _NEVER):
                        ceilings[level] = tag
        slots = min(chosen.limit, len(chosen.queue.requests))
        seconds = self.predictor.forecast(key, slots, _neighbours(lanes, chosen.lane)).median
        requests = self._turns[key].fill(chosen.limit, seconds / slots, ceilings, seconds)
        return _issue(chosen, requests, lanes, min(rank[1], ceilings.get(priority, _NEVER)))

    def _turns_of(self, queue: Queue) -> Turns:
        turns = self._turns.get(queue.key)
        if turns is None or turns.queue is not queue:
            turns = self._turns[queue.key] = Turns(queue)
        return turns

    def _time(self, priority: int) -> VirtualTime:
        time = self._times.get(priority)
        if time is None:
            time = self._times[priority] = VirtualTime()
        return time

    def _arrived(self, flow: Flow) -> Account:
        return self._time(flow[0]).arrived(flow[1])

    def issued(self, issue: Issue, now: float) -> None:
        """Charges its tenants what it will probably take."""
        self._cohorts.issued(issue.key, issue.requests)
        if issue.start is None:
            if self._turns:
                self._turns.clear()
                for time in self._times.values():
                    time.rest()
            return
        slots = len(issue.requests)
        each = self.predictor.forecast(issue.key, slots, issue.neighbours).median / slots
        units = self._charge(issue, each)
        self._flying[issue] = _Charge(each, units)
        priority = max([request.quota.priority for request in issue.requests])
        time = self._time(priority)
        time.advance(issue.start)
        if time.crowded:
            members = [turns.members for turns in self._turns.values()]
            time.prune({tenant for flows in members for level, tenant in flows if level == priority})

    def _charge(self, issue: Issue, each: float) -> dict[Account, float]:
        """Charges ``each`` device seconds a slot; returns slots over weight by account."""
        units: dict[Account, float] = {}
        last: Quota | None = None
        for request in issue.requests:
            quota = request.quota
            if quota is not last:
                last = quota
                account, unit = self._time(quota.priority).account(quota.tenant), 1.0 / quota.weight
            units[account] = units.get(account, 0.0) + unit
        for account, unit in units.items():
            account.charge(each * unit)
        return units

    def completed(self, issue: Issue, now: float, seconds: float) -> None:
        """Corrects the charge, learns how long such bundles take and starts the linger of its cohort."""
        self._cohorts.completed(issue.key, now, seconds)
        slots = len(issue.requests)
        if seconds > 0.0:
            self.predictor.observe(issue.key, slots, issue.neighbours, seconds)
        if issue.start is None:
            return
        charge = self._flying.pop(issue, None)
        if charge is None:
            self._charge(issue, seconds / slots)
            return
        error = seconds / slots - charge.each
        for account, unit in charge.units.items():
            account.charge(error * unit)

    def forget(self, key: str) -> None:
        """Drops what is known of a program's clients and times."""
        self._cohorts.forget(key)
        self._turns.pop(key, None)
        self.predictor.forget(key)


def _issue(
    choice: _Open, requests: Sequence[Ticket], lanes: Sequence[LaneLoad], start: float | None
) -> Issue:
    neighbours = _neighbours(lanes, choice.lane)
    return Issue(choice.queue.key, requests, share_of(requests), choice.lane, neighbours, start)


def _neighbours(lanes: Sequence[LaneLoad], lane: int) -> int:
    """Bundles under way beside that lane."""
    if len(lanes) == 1:
        return 0
    return sum([load.bundles for load in lanes]) - lanes[lane].bundles


def _lane(lanes: Sequence[LaneLoad], ordered: bool, settings: Settings) -> int | None:
    """The least loaded lane with room, or None."""
    best = 0
    if not ordered:
        for lane, load in enumerate(lanes):
            if load.bundles < lanes[best].bundles:
                best = lane
    return best if lanes[best].bundles < settings.in_flight else None

"""The policy: who goes out next, by class and fair share, with companions of the same program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Final, NamedTuple

from torch_mux.runtime.scheduler.backlog import Backlog
from torch_mux.runtime.scheduler.base import (
    Busy,
    Decision,
    Issue,
    LaneLoad,
    Later,
    Queue,
    QueueName,
    Ticket,
    View,
    share_of,
)
from torch_mux.runtime.scheduler.cohorts import Cohorts
from torch_mux.runtime.scheduler.deadlines import Urgent, attainable, latest_start, urgent
from torch_mux.runtime.scheduler.fair import Account, VirtualTime
from torch_mux.runtime.scheduler.formation import Turns
from torch_mux.runtime.scheduler.predictor import Context, Forecast, Predictor, context
from torch_mux.settings import Settings
from torch_mux.types import Quota

__all__ = ["FairPolicy"]

_NEVER = float("inf")
_STALE = 1.0
_WEIGHT: Final[Callable[[Quota], float]] = attrgetter("weight")


class _Open(NamedTuple):
    """A queue that a bundle may be made of now."""

    queue: Queue
    lane: int
    limit: int
    neighbours: int


@dataclass
class _Charge:
    """What the tenants of a bundle under way were charged before its time was known."""

    each: float
    units: dict[Account, float]


class FairPolicy:
    """Weighted fair by device seconds, by program.

    While everything that is pending and can run fits one bundle, it goes out at once, in order of arrival,
    but for the holds of :class:`Cohorts`. Where something has to stay behind, the order is: priority class;
    earliest deadline among those who would be late behind another bundle and can be in time now; least start
    tag (:class:`VirtualTime`); age. The first in that order names the program. His companions of the same
    program go with him in the same order, except who is further ahead than the *allowance* of those who wait
    for another program: the time of one such bundle. The device is never left idle for the sake of an order.

    A hold ends, and a bundle has fewer slots, where it would make somebody late. A deadline takes nobody who
    is ahead of the others by more than the longest bundle.

    *Lag.* Let two tenants f and g of one class have something pending, in programs whose plans are there, at
    every decision of an interval. Then the device seconds W that they are charged in it satisfy
    ``|W_f / w_f - W_g / w_g| <= B_f + B_g``, where ``B_x = (A + c_x) / w_x + E``: w are the weights, A is the
    longest forecast of a bundle, c_x the most that one slot of x is charged, and E the most by which the
    forecasts of the bundles under way are off, over the smallest weight. With one program and nobody in a
    hurry A is 0; where forecasts come true as well, this is the bound of start-time fair queueing,
    ``c_f / w_f + c_g / w_g``.

    Args:
        weight: the weight of a quota in all of this.
    """

    def __init__(
        self, predictor: Predictor | None = None, weight: Callable[[Quota], float] = _WEIGHT
    ) -> None:
        self.predictor = Predictor() if predictor is None else predictor
        self._weight = weight
        self._cohorts = Cohorts()
        self._backlog = Backlog()
        self._times: dict[int, VirtualTime] = {}
        self._turns: dict[str, Turns] = {}
        self._flying: dict[Issue, _Charge] = {}
        self._shares: dict[str, float] = {}
        self._measured: dict[str, float] = {}

    def form(self, view: View, now: float, settings: Settings) -> Decision:
        """The bundle of whoever is first, or how long to wait."""
        until = _NEVER
        wake: dict[QueueName, int] = {}
        held = full = timed = False
        ready: list[Queue] = []
        choices: list[_Open] = []
        free, first_lane = _free(view, settings), _first(view, settings)
        for queue in view.queues:
            if not queue.ready:
                continue
            ready.append(queue)
            lane = first_lane if queue.ordered else free
            if lane is None:
                full = True
                continue
            limit, count = max(1, min(settings.max_bundle, queue.slots)), len(queue.requests)
            choice = _Open(queue, lane, limit, _neighbours(view.lanes, lane))
            awaited = self._cohorts.awaited(queue, now, settings) if count < limit else None
            if queue.timed:
                timed = True
                awaited = self._hurried(choice, awaited, now)
            if awaited is None:
                choices.append(choice)
                continue
            moment, missing = awaited
            wake[queue.key, queue.reserved] = min(limit, count + missing)
            held = held or moment is None
            until = until if moment is None else min(until, moment)
        if choices:
            return self._chosen(ready, choices, self._urgent(choices, now) if timed else {}, now)
        if until < _NEVER:
            return Later(until, wake)
        if held:
            return Busy(wake)
        return Busy(until=self._backlog.next_end()) if full else None

    def _hurried(
        self, choice: _Open, awaited: tuple[float | None, int] | None, now: float
    ) -> tuple[float | None, int] | None:
        """A hold ends before it makes somebody late."""
        if awaited is None:
            return None
        moment, missing = awaited
        begin = self._backlog.free_at(choice.lane, now)
        latest = latest_start(choice.queue, begin, self._forecast(choice, 1).high)
        if latest <= now:
            return None
        return (moment if moment is None else min(moment, latest)), missing

    def _urgent(self, choices: Sequence[_Open], now: float) -> dict[str, list[Urgent]]:
        """By program, who cannot wait for another bundle and is not ahead of others by more than that."""
        slots = [min(choice.limit, len(choice.queue.requests)) for choice in choices]
        longest = max(self._forecast(*each).median for each in zip(choices, slots, strict=True))
        found: dict[str, list[Urgent]] = {}
        for choice in choices:
            if choice.queue.timed:
                begin, alone = self._backlog.free_at(choice.lane, now), self._forecast(choice, 1).high
                entitled = [
                    one
                    for one in urgent(choice.queue, begin, alone, longest)
                    if self._time(one.flow[0]).lead(one.flow[1]) * self._weight(one.head.quota) <= longest
                ]
                if entitled:
                    found[choice.queue.key] = entitled
        return found

    def _chosen(
        self, ready: Sequence[Queue], choices: Sequence[_Open], urgent: dict[str, list[Urgent]], now: float
    ) -> Issue:
        if urgent:
            choices = [self._smaller(choice, urgent.get(choice.queue.key), now) for choice in choices]
        first = choices[0]
        if len(ready) == 1 and len(first.queue.requests) <= first.limit:
            return _issue(first, tuple(first.queue.requests), None)
        return self._contended(ready, choices, urgent)

    def _smaller(self, choice: _Open, urgent: Sequence[Urgent] | None, now: float) -> _Open:
        """A bundle that would make its most urgent tenant late has fewer slots."""
        if not urgent:
            return choice
        room = urgent[0].due - self._backlog.free_at(choice.lane, now)
        limit = min(choice.limit, len(choice.queue.requests))
        most = attainable(limit, room, lambda slots: self._forecast(choice, slots).high)
        return choice if most == limit else choice._replace(limit=most)

    def _contended(
        self, ready: Sequence[Queue], choices: Sequence[_Open], urgent: dict[str, list[Urgent]]
    ) -> Issue:
        """Something stays behind: the order says what."""
        waiting = {queue.key: self._turns_of(queue).least(self._time) for queue in ready}
        chosen, best = choices[0], (0, 0, _NEVER, 0)
        for choice in choices:
            rank = _rank(waiting[choice.queue.key], urgent.get(choice.queue.key))
            if choice is chosen or rank < best:
                chosen, best = choice, rank
        key = chosen.queue.key
        ceilings: dict[int, float] = {}
        for other, least in waiting.items():
            if other != key:
                for level, (tag, _) in least.items():
                    if tag < ceilings.get(level, _NEVER):
                        ceilings[level] = tag
        slots = min(chosen.limit, len(chosen.queue.requests))
        seconds = self._forecast(chosen, slots).median
        hurry = {one.flow: one.due for one in urgent.get(key, ())}
        requests = self._turns[key].fill(chosen.limit, seconds / slots, ceilings, seconds, hurry)
        priority = max(waiting[key])
        return _issue(chosen, requests, min(waiting[key][priority][0], ceilings.get(priority, _NEVER)))

    def _forecast(self, choice: _Open, slots: int) -> Forecast:
        """Under the cap that the program last ran under."""
        key = choice.queue.key
        where = context(self._shares.get(key, 1.0), choice.neighbours)
        return self.predictor.forecast(key, slots, where)

    def _turns_of(self, queue: Queue) -> Turns:
        turns = self._turns.get(queue.key)
        if turns is None or turns.queue is not queue:
            turns = self._turns[queue.key] = Turns(queue, self._weight)
        return turns

    def _time(self, priority: int) -> VirtualTime:
        time = self._times.get(priority)
        if time is None:
            time = self._times[priority] = VirtualTime()
        return time

    def issued(self, issue: Issue, now: float) -> None:
        """Charges its tenants what it will probably take."""
        self._cohorts.issued(issue.key, issue.requests)
        slots = len(issue.requests)
        self._shares[issue.key] = issue.share
        seconds = self.predictor.forecast(issue.key, slots, _where(issue)).median
        self._backlog.issued(issue, now, seconds)
        if issue.start is None:
            if self._turns:
                self._turns.clear()
                for time in self._times.values():
                    time.rest()
            return
        each = seconds / slots
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
                account, unit = self._time(quota.priority).account(quota.tenant), 1.0 / self._weight(quota)
            units[account] = units.get(account, 0.0) + unit
        for account, unit in units.items():
            account.charge(each * unit)
        return units

    def completed(self, issue: Issue, now: float, seconds: float) -> None:
        """Corrects the charge, learns how long such bundles take and starts the linger of its cohort."""
        self._cohorts.completed(issue.key, now, seconds)
        self._backlog.completed(issue, now)
        slots = len(issue.requests)
        if seconds > 0.0:
            self.predictor.observe(issue.key, slots, _where(issue), seconds)
            self._measured[issue.key] = now
        if issue.start is None:
            return
        charge = self._flying.pop(issue, None)
        if charge is None:
            self._charge(issue, seconds / slots)
            return
        error = seconds / slots - charge.each
        for account, unit in charge.units.items():
            account.charge(error * unit)

    def outlook(self, key: str, slots: int, bundles: int, now: float, reserved: bool = False) -> float | None:
        """When so many bundles of that many slots would have ended that are enqueued now.

        None where too little was measured, or nothing for a second: then somebody has to go first.
        """
        if now - self._measured.get(key, -_NEVER) > _STALE:
            return None
        forecast = self.predictor.forecast(key, slots, context(self._shares.get(key, 1.0), 0))
        return self._backlog.earliest(now) + bundles * forecast.median if forecast.known else None

    def forget(self, key: str) -> None:
        """Drops what is known of a program's clients and times."""
        self._cohorts.forget(key)
        self._turns.pop(key, None)
        self._shares.pop(key, None)
        self._measured.pop(key, None)
        self.predictor.forget(key)


def _rank(
    least: dict[int, tuple[float, int]], urgent: Sequence[Urgent] | None
) -> tuple[int, int, float, int]:
    """Priority class, then earliest deadline of who is in a hurry, then least start tag, then age."""
    priority = max(least)
    if urgent:
        level = max(one.flow[0] for one in urgent)
        if level == priority:
            due, seq = min((one.due, one.seq) for one in urgent if one.flow[0] == level)
            return -priority, 0, due, seq
    tag, seq = least[priority]
    return -priority, 1, tag, seq


def _issue(choice: _Open, requests: Sequence[Ticket], start: float | None) -> Issue:
    queue, share = choice.queue, share_of(requests)
    return Issue(queue.key, requests, share, choice.lane, choice.neighbours, start, queue.reserved)


def _where(issue: Issue) -> Context:
    return context(issue.share, issue.neighbours)


def _neighbours(lanes: Sequence[LaneLoad], lane: int) -> int:
    """Bundles under way beside that lane."""
    if len(lanes) == 1:
        return 0
    return sum([load.bundles for load in lanes]) - lanes[lane].bundles


def _free(view: View, settings: Settings) -> int | None:
    """The least loaded usable lane, where it has room."""
    lanes = view.lanes
    usable = range(len(lanes)) if view.usable is None else view.usable
    best = usable[0]
    for lane in usable:
        if lanes[lane].bundles < lanes[best].bundles:
            best = lane
    return best if lanes[best].bundles < settings.in_flight else None


def _first(view: View, settings: Settings) -> int | None:
    """The first lane, where it has room."""
    return 0 if view.lanes[0].bundles < settings.in_flight else None

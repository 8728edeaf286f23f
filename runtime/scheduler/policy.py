"""The policy: who goes out next, by class and fair share, with companions of the same program."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from operator import attrgetter
from typing import Final

from torch_mux.runtime.scheduler.absent import Absent, Bar
from torch_mux.runtime.scheduler.backlog import Backlog
from torch_mux.runtime.scheduler.base import Busy, Decision, Issue, Queue, Ticket, View, share_of
from torch_mux.runtime.scheduler.branches import Homes, part_of
from torch_mux.runtime.scheduler.cohorts import Cohorts
from torch_mux.runtime.scheduler.deadlines import Urgent, attainable, latest_start, urgent
from torch_mux.runtime.scheduler.everything import all_at_once, even_start
from torch_mux.runtime.scheduler.fair import Account, Charge, VirtualTime
from torch_mux.runtime.scheduler.formation import Turns
from torch_mux.runtime.scheduler.order import Order, Place
from torch_mux.runtime.scheduler.predictor import UNKNOWN, Forecast, Predictor, context
from torch_mux.runtime.scheduler.search import Open, Search, at_once, first_lane, free_lane
from torch_mux.settings import Settings
from torch_mux.types import Quota

__all__ = ["FairPolicy"]

_NEVER, _STALE = float("inf"), 1.0
_WEIGHT: Final[Callable[[Quota], float]] = attrgetter("weight")


class FairPolicy:
    """Weighted fair by device seconds, by program.

    While everything that is pending and can run fits one bundle, and nobody of another program is at work, it
    goes out at once, in order of arrival, but for the holds of :class:`Cohorts`. Otherwise the order is:
    priority class; earliest deadline among those who would be late behind another bundle and can be in time
    now; least start tag (:class:`VirtualTime`); age. The first in that order names the program. His
    companions of the same program go with him in the same order, except who is further ahead than the
    *allowance* of those who wait for another program: the time of one such bundle.

    The first waits himself if he is ahead by more than his bundle of somebody who is expected back to another
    program (:class:`Absent`), or whose program is held for companions. The device is left idle for that no
    longer than ``linger`` after its last bundle, and a lane beside a bundle under way no longer than that was
    forecast to take, and the linger.

    A hold ends, and a bundle has fewer slots, where it would make somebody late. A deadline takes nobody who
    is ahead of the others by more than the longest bundle.

    *Lag.* Let two tenants f and g of one class have something pending, in programs whose plans are there, at
    every decision of an interval. Then the device seconds W that they are charged in it satisfy
    ``|W_f / w_f - W_g / w_g| <= B_f + B_g``, where ``B_x = (A + c_x) / w_x + E``: w are the weights, A is the
    longest forecast of a bundle, c_x the most that one slot of x is charged, and E the most by which the
    forecasts of the bundles under way are off, over the smallest weight. If they are pending or expected back
    at every decision, the same holds with 2 A for A. With one program and nobody in a hurry A is 0; where
    forecasts come true as well, this is the bound of start-time fair queueing, ``c_f / w_f + c_g / w_g``.
    On branches a bundle is charged its part of the time in which the device was busy.

    Args:
        weight: the weight of a quota in all of this.
    """

    def __init__(
        self, predictor: Predictor | None = None, weight: Callable[[Quota], float] = _WEIGHT
    ) -> None:
        self.predictor = Predictor() if predictor is None else predictor
        self._weight = weight
        self.order = Order(weight)
        self._cohorts = Cohorts()
        self._absent = Absent()
        self._backlog = Backlog()
        self._homes = Homes()
        self._times: dict[int, VirtualTime] = {}
        self._news: dict[str, Queue] = {}
        self._timed: dict[str, Queue] = {}
        self._flying: dict[Issue, Charge] = {}
        self._shares: dict[str, float] = {}
        self._measured: dict[str, float] = {}
        self._charging, self._linger = False, 0.0

    def form(self, view: View, now: float, settings: Settings) -> Decision:
        """The bundle of whoever is first, or how long to wait."""
        self._linger = settings.linger
        if view.fresh is None:
            self.order.clear()
        self.note(view.queues if view.fresh is None else view.fresh)
        free, first = free_lane(view, settings), first_lane(view, settings)
        if free is None and first is None:
            return Busy(until=self._backlog.next_end()) if any(queue.ready for queue in view.queues) else None
        lane_of = self._homes.lane_of(view, settings, now, (free, first))
        only = next(iter(view.queues)) if len(view.queues) == 1 else None
        if only is not None and not (only.ready and self._free(only.key, now)):
            only = None
        if only is not None and (issue := at_once(only, lane_of, view, self._cohorts, now, settings)):
            return issue
        search = Search(view, now, settings, lane_of, self._backlog.next_end)
        if only is not None:
            choice = search.opened(only, self._held)
            if choice is None:
                return search.nothing()
            if self._whole(choice, search):
                return self._issue(choice, tuple(only.requests), None, search)
        self._sort_in()
        return self._first(search) or search.nothing()

    def everything(self, view: View, now: float, settings: Settings) -> Sequence[Issue]:
        """See :class:`Policy`; if somebody is, or might be, at work or expected back, tenants are charged."""
        lanes, start = (free_lane(view, settings), first_lane(view, settings)), None
        if lanes == (None, None) or not self._homes.settled(view):
            return ()
        if settings.linger <= 0.0 or self._absent.anybody(now, settings.linger):
            _, expected = self._absent.bars("", now, settings.linger, self._time)
            if (start := even_start(view.queues, self._time, self._weight, expected, self._alone)) is None:
                return ()
        lane_of = self._homes.lane_of(view, settings, now, lanes)
        return all_at_once(view, lane_of, self._cohorts, now, settings, start)

    def _sort_in(self) -> None:
        """Takes what is new, and what became ready, into the order."""
        self.order.wake(self._time)
        for queue in self._news.values():
            self.order.put(queue, self._time)
        self._news.clear()

    def note(self, fresh: Iterable[Queue]) -> None:
        """Something new is pending in these; see :class:`View`."""
        for queue in fresh:
            self._news[queue.key] = queue
            if queue.timed:
                self._timed[queue.key] = queue

    def _free(self, key: str, now: float) -> bool:
        """Whether a bundle of everything that is pending would take nothing from anybody."""
        return not self._absent.anybody(now, self._linger, but=None if self._charging else key)

    def _whole(self, choice: Open, search: Search) -> bool:
        """Whether all that is pending of a program fits one bundle, and makes nobody late."""
        count = len(choice.queue.requests)
        if count > choice.limit:
            return False
        if not choice.queue.timed:
            return True
        longest = self._forecast(choice, count).median
        return self._smaller(choice, self._entitled(choice, longest, search.now), search.now).limit >= count

    def _held(self, choice: Open, search: Search) -> tuple[float | None, int] | None:
        """For how long, and for how many, a program is held; see :class:`Cohorts`."""
        queue = choice.queue
        full = len(queue.requests) >= choice.limit
        awaited = None if full else self._cohorts.awaited(queue, search.now, search.settings)
        if awaited is None or not queue.timed:
            return awaited
        moment, missing = awaited
        begin = self._backlog.free_at(choice.lane, search.now)
        latest = latest_start(queue, begin, self._forecast(choice, 1).high)
        if latest <= search.now:
            return None  # a hold ends before it makes somebody late
        return (moment if moment is None else min(moment, latest)), missing

    def _first(self, search: Search) -> Issue | None:
        """The bundle of who is first by class, deadline, start tag and age; None where it has to wait."""
        hurry = self._urgent(search) if self._timed else {}
        for level in self.order.levels():
            if level in hurry:
                choice, urgent = hurry[level]
                choice = self._smaller(choice, urgent, search.now)
                return self._bundle(level, choice, urgent, search, self._bars(choice, search))
            passed: dict[Queue, float] = {}

            def accept(turns: Turns, tag: float, passed: dict[Queue, float] = passed) -> bool:
                if search.opened(turns.queue, self._held) is not None:
                    return True
                if search.passes(turns.queue):
                    passed[turns.queue] = tag
                return False

            place = self.order.pick(level, accept)
            if place is not None:
                return self._unless_ahead(level, place, min(passed.values(), default=_NEVER), search)
            if any((queue.key, queue.reserved) in search.full for queue in passed):
                return None  # beside it, a lower class would make it slower
        return None

    def _unless_ahead(self, level: int, place: Place, passed: float, search: Search) -> Issue | None:
        """The bundle of who is first of those that may go, unless too far ahead of others.

        Args:
            passed: the least start tag of programs that are held for companions, or whose branch is full.
        """
        tag, _, _, turns = place
        choice = search.opened(turns.queue, self._held)
        assert choice is not None
        bars = self._bars(choice, search)
        bar = bars[0].get(level)
        least = passed if bar is None else min(passed, bar.tag)
        if tag > least:
            first = turns.first(level)
            if first is not None and (tag - least) * first[2] > self._seconds(choice):
                if bar is not None and bar.tag == least:
                    self._absent.awaited(bar, self._time)
                    search.wait(bar.until, bar.due)
                return None
        return self._bundle(level, choice, (), search, bars)

    def _bars(self, choice: Open, search: Search) -> tuple[dict[int, Bar], dict[int, float]]:
        return self._absent.bars(choice.queue.key, search.now, self._linger, self._time)

    def _urgent(self, search: Search) -> dict[int, tuple[Open, list[Urgent]]]:
        """By class, the program of who is most urgent, and all who are in it."""
        choices = []
        for queue in list(self._timed.values()):
            if not queue.timed:
                del self._timed[queue.key]
            elif queue.ready and (choice := search.opened(queue, self._held)) is not None:
                choices.append(choice)
        found: dict[int, tuple[Open, list[Urgent]]] = {}
        if not choices:
            return found
        open_now = [search.opened(queue, self._held) for queue in search.view.queues if queue.ready]
        longest = max(self._seconds(choice) for choice in open_now if choice is not None)
        for choice in choices:
            for one in (entitled := self._entitled(choice, longest, search.now)):
                best = found.get(one.flow[0])
                if best is None or one < best[1][0]:
                    same = [other for other in entitled if other.flow[0] == one.flow[0]]
                    found[one.flow[0]] = choice, same
        return found

    def _entitled(self, choice: Open, longest: float, now: float) -> list[Urgent]:
        """Who of a program cannot wait for another bundle and is not ahead of others by more than that."""
        begin, alone = self._backlog.free_at(choice.lane, now), self._forecast(choice, 1).high
        return [one for one in urgent(choice.queue, begin, alone, longest) if self._lead(one) <= longest]

    def _lead(self, one: Urgent) -> float:
        """Device seconds by which somebody is ahead of virtual time."""
        return self._time(one.flow[0]).lead(one.flow[1]) * self._weight(one.head.quota)

    def _smaller(self, choice: Open, urgent: Sequence[Urgent], now: float) -> Open:
        """A bundle that would make its most urgent tenant late has fewer slots."""
        if not urgent or len(choice.queue.requests) > choice.limit:
            return choice
        room = urgent[0].due - self._backlog.free_at(choice.lane, now)
        limit = min(choice.limit, len(choice.queue.requests))
        most = attainable(limit, room, lambda slots: self._forecast(choice, slots).high)
        return choice if most == limit else choice._replace(limit=most)

    def _bundle(
        self,
        level: int,
        choice: Open,
        urgent: Sequence[Urgent],
        search: Search,
        absent: tuple[Mapping[int, Bar], Mapping[int, float]],
    ) -> Issue:
        """The bundle of a program that is first in its class."""
        queue, (bars, expected) = choice.queue, absent
        turns = self.order.turns(queue.key)
        assert turns is not None
        ceilings, top = self.order.ceilings(turns, {one: bar.tag for one, bar in bars.items()})
        count = len(queue.requests)
        if top is None and count <= choice.limit and self._free(queue.key, search.now):
            return self._issue(choice, tuple(queue.requests), None, search)
        slots, seconds = min(choice.limit, count), self._seconds(choice)
        hurry = {one.flow: one.due for one in urgent}
        first = turns.first(level)
        tag, ceiling = _NEVER if first is None else first[0], ceilings.get(level, _NEVER)
        if tag <= ceiling and not urgent and turns.single:
            requests = tuple(islice(queue.requests, choice.limit))
        else:
            requests = turns.fill(choice.limit, seconds / slots, ceilings, seconds, top, hurry)
        return self._issue(choice, requests, min(tag, ceiling, expected.get(level, _NEVER)), search)

    def _issue(self, choice: Open, requests: Sequence[Ticket], start: float | None, search: Search) -> Issue:
        queue, share = choice.queue, share_of(requests)
        beside, most = 1.0, search.settings.beside
        if most is not None and choice.branch is not None:
            beside = part_of(self._alone(queue), self._homes.others(choice, search, self._alone), most)
        place = choice.lane, choice.neighbours, start, queue.reserved, 0.0, choice.branch, beside
        return Issue(queue.key, requests, share, *place)

    def _alone(self, queue: Queue) -> float:
        """What is pending of a program would take on an idle device."""
        return self.predictor.forecast(queue.key, len(queue.requests), context(1.0, 0)).median

    def _seconds(self, choice: Open) -> float:
        """What the largest bundle that may be made of a program now will probably take."""
        return self._forecast(choice, min(choice.limit, len(choice.queue.requests))).median

    def _forecast(self, choice: Open, slots: int) -> Forecast:
        """Under the cap that the program last ran under."""
        key = choice.queue.key
        where = context(self._shares.get(key, 1.0), choice.neighbours)
        return self.predictor.forecast(key, slots, where)

    def _time(self, priority: int) -> VirtualTime:
        time = self._times.get(priority)
        if time is None:
            time = self._times[priority] = VirtualTime()
        return time

    def next_end(self) -> float | None:
        """See :class:`Policy`."""
        return self._backlog.next_end()

    def issued(self, issue: Issue, now: float) -> None:
        """Charges its tenants what it will probably take."""
        self._cohorts.issued(issue.key, issue.requests)
        slots = len(issue.requests)
        self._shares[issue.key] = issue.share
        forecast = self.predictor.forecast(issue.key, slots, context(issue.share, issue.neighbours))
        seconds = forecast.median
        self._backlog.issued(issue, now, seconds)
        self._homes.issued(issue, now, seconds)
        self._absent.issued(issue, now, self._backlog.free_at(issue.lane, now), self._linger)
        if issue.start is None:
            self._rest(issue.key)
            return
        self._charging = True
        # Too much is given back with later charges only: a first run of a minute must not be charged twice.
        likely = seconds if forecast.known else min(seconds, UNKNOWN * slots)
        each = likely / slots * self._homes.part(issue)
        units = self._charge(issue, each)
        self._flying[issue] = Charge(each, units)
        classes = len(self._times) > 1
        levels = {request.quota.priority for request in issue.requests} if classes else self._times.keys()
        priority = max(levels)
        if len(levels) == 1:
            self._absent.charged(issue, priority, list(units))
        time = self._time(priority)
        time.advance(issue.start)
        if time.crowded:
            time.prune(self.order.members(priority) | self._absent.members(priority))

    def _rest(self, key: str) -> None:
        """Everything that was pending goes out, and nobody competes: the busy period is over."""
        self._news.pop(key, None)
        if self._times:
            self.order.clear()
            self._times.clear()
            self._absent.rest()
        self._charging = False

    def _charge(self, issue: Issue, each: float) -> dict[Account, float]:
        """Charges ``each`` device seconds a slot; returns slots over weight by account."""
        units: dict[Account, float] = {}
        weight, last, level = self._weight, None, None
        for request in issue.requests:
            quota = request.quota
            if quota is not last:
                last = quota
                if quota.priority != level:
                    level = quota.priority
                    time = self._time(level)
                account, unit = time.account(quota.tenant), 1.0 / weight(quota)
            units[account] = units.get(account, 0.0) + unit
        for account, unit in units.items():
            account.charge(each * unit)
        return units

    def completed(self, issue: Issue, now: float, seconds: float, charge: float | None = None) -> None:
        """Corrects the charge, learns how long such bundles take and starts the linger of its cohort."""
        self._cohorts.completed(issue.key, now, seconds)
        self._backlog.completed(issue, now)
        cost = self._homes.completed(issue, seconds, charge)
        self._absent.completed(issue, now, seconds, self._backlog.free_at(issue.lane, now))
        slots = len(issue.requests)
        if seconds > 0.0:
            self.predictor.observe(issue.key, slots, context(issue.share, issue.neighbours), seconds)
            self._measured[issue.key] = now
        if issue.start is None:
            return
        before = self._flying.pop(issue, None)
        if before is None:
            self._charge(issue, cost / slots)
            return
        error = cost / slots - before.each
        for account, unit in before.units.items():
            account.charge(error * unit)

    def outlook(self, key: str, slots: int, bundles: int, now: float, reserved: bool = False) -> float | None:
        """When so many bundles of that many slots would have ended that are enqueued now.

        None where too little was measured, or nothing for a second: then somebody has to go first.
        """
        if now - self._measured.get(key, -_NEVER) > _STALE:
            return None
        forecast = self.predictor.forecast(key, slots, context(self._shares.get(key, 1.0), 0))
        begin = self._backlog.begin(self._homes.lane(key), now)
        return begin + bundles * forecast.median if forecast.known else None

    def forget(self, key: str) -> None:
        """Drops what is known of a program's clients and times."""
        self._cohorts.forget(key)
        self._homes.forget(key)
        self._absent.forget(key)
        self._shares.pop(key, None)
        self._measured.pop(key, None)
        self.predictor.forget(key)

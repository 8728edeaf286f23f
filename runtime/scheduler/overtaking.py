"""Who goes before long bundles that are under way, between two of their segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch_mux.runtime.scheduler.base import Busy, Decision, Issue, LaneKind, View
from torch_mux.runtime.scheduler.deadlines import Urgent, urgent
from torch_mux.runtime.scheduler.policy import FairPolicy
from torch_mux.runtime.scheduler.search import Open, Search
from torch_mux.settings import Settings

__all__ = ["OvertakingPolicy"]


class OvertakingPolicy(FairPolicy):
    """A :class:`FairPolicy` whose urgent bundles need not wait for those under way, where these are cut.

    With ``Settings.segment`` a device has a lane for that (``LaneKind.PASSING``). A bundle goes on it if what
    is under way on other lanes takes more than a segment longer, and if somebody in it is of a higher class
    than all who are under way; or is of no lower class, is due before all of them, would be late behind them,
    and is in time if he waits for one segment. He must not be ahead of virtual time by more than what he
    would have to wait, as for any deadline.

    *Bound.* While forecasts hold, who is of a higher class than all who are under way waits for at most one
    segment. Bundles that overtook before are not overtaken; who waits for such, or for his own class, waits
    for at most two segments besides. A segment is as long as the estimates by which it was cut are right, and
    at least one launch. What is not captured, kernel by kernel or per instance, has no segments.
    """

    #: The lane for who overtakes, and seconds of a segment, once there is one.
    _passing: tuple[int, float] | None = None

    def form(self, view: View, now: float, settings: Settings) -> Decision:
        """See :class:`FairPolicy`; what is under way may be overtaken."""
        self._passing = None
        decision = super().form(view, now, settings)
        lane = None if settings.segment is None or decision is None else _passing_lane(view)
        if settings.segment is None or lane is None:
            return decision
        self._passing = lane, settings.segment
        begin = self._backlog.free_at(lane, now)
        common = [index for index, one in enumerate(view.lanes) if one.kind is LaneKind.COMMON]
        wait = max(self._backlog.free_at(index, now) for index in common) - begin
        if wait > settings.segment:
            issue = self._past(view, lane, common, (begin, wait), now, settings)
            if issue is not None and view.lanes[lane].bundles < settings.in_flight:
                return replace(issue, passes=True)
            if issue is not None:
                return Busy({}, self._backlog.next_end())  # behind those under way he would wait longer
        if isinstance(decision, Busy) and decision.wake is None:
            return Busy({}, decision.until)  # whoever comes may be more urgent
        return decision

    def everything(self, view: View, now: float, settings: Settings) -> Sequence[Issue]:
        """See :class:`Policy`; where bundles may be overtaken the order is never indifferent."""
        return () if settings.segment is not None else super().everything(view, now, settings)

    def _past(
        self,
        view: View,
        lane: int,
        common: Sequence[int],
        times: tuple[float, float],
        now: float,
        settings: Settings,
    ) -> Issue | None:
        """The bundle of who is more urgent than all who are under way.

        Args:
            common: the lanes that he would have to wait for, or run beside.
            times: when he would begin, and how much longer these have something under way.
        """
        ahead = [ticket for index in common for ticket in self._backlog.tickets(index)]
        level = max((ticket.quota.priority for ticket in ahead), default=0)
        soonest = min((ticket.due for ticket in ahead), default=float("inf"))
        self._sort_in()
        search = Search(
            view, now, settings, lambda queue: None if queue.ordered else lane, self._backlog.next_end
        )
        for one in self.order.levels():
            if one < level:
                break
            choice, hurried = self._due_before(one, soonest, times, search)
            if choice is not None:
                choice = self._smaller(choice, hurried, now)
            elif one > level:
                place = self.order.pick(
                    one, lambda turns, tag: search.opened(turns.queue, self._held) is not None
                )
                choice = None if place is None else search.opened(place[3].queue, self._held)
            if choice is not None:
                return self._bundle(one, choice, hurried, search, self._bars(choice, search))
        return None

    def _due_before(
        self, level: int, soonest: float, times: tuple[float, float], search: Search
    ) -> tuple[Open | None, list[Urgent]]:
        """The program of who of a class would be late for waiting, and is in time behind one segment."""
        begin, wait = times
        segment = search.settings.segment or 0.0
        best: tuple[Open | None, list[Urgent]] = (None, [])
        for queue in list(self._timed.values()):
            choice = search.opened(queue, self._held) if queue.ready and queue.timed else None
            if choice is None:
                continue
            found = [
                one
                for one in urgent(queue, begin + segment, self._forecast(choice, 1).high, wait - segment)
                if one.flow[0] == level and one.due < soonest and self._lead(one) <= wait
            ]
            if found and (best[0] is None or found[0] < best[1][0]):
                best = choice, found
        return best

    def outlook(self, key: str, slots: int, bundles: int, now: float, reserved: bool = False) -> float | None:
        """See :class:`FairPolicy`; who may overtake may end sooner."""
        found, passing = super().outlook(key, slots, bundles, now, reserved), self._passing
        if found is None or passing is None:
            return found
        lane, segment = passing
        later = self._backlog.begin(self._homes.lane(key), now)
        return found - max(0.0, later - self._backlog.free_at(lane, now) - segment)

    def issued(self, issue: Issue, now: float) -> None:
        """See :class:`FairPolicy`; those who stop for it come back later."""
        super().issued(issue, now)
        if issue.passes:
            self._absent.put_off(lambda lane: self._backlog.free_at(lane, now))


def _passing_lane(view: View) -> int | None:
    """The lane for who overtakes."""
    for index, lane in enumerate(view.lanes):
        if lane.kind is LaneKind.PASSING:
            return index
    return None

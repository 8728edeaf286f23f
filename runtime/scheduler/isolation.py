"""Tenants with a reserve on a lane of their own, while the others leave them their part of the device."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from operator import attrgetter

from torch_mux.runtime.scheduler.base import (
    Busy,
    Decision,
    Issue,
    LaneKind,
    LaneLoad,
    Later,
    Queue,
    QueueName,
    View,
)
from torch_mux.runtime.scheduler.overtaking import OvertakingPolicy
from torch_mux.runtime.scheduler.policy import FairPolicy
from torch_mux.runtime.scheduler.predictor import Predictor, context
from torch_mux.runtime.scheduler.reserves import Reserves
from torch_mux.settings import Settings

__all__ = ["IsolatingPolicy"]

_LEAST = 0.01
_MANY = 1 << 30
#: Seconds that a bundle of others is taken to last before one was forecast.
_UNKNOWN = 1e-3


class IsolatingPolicy:
    """Two :class:`FairPolicy`, one for tenants with a reserve and one for the others, on different lanes.

    A request with a reserve goes to the reserved lane at once, whatever the others have under way. Among such
    tenants the weights are their reserves, so that each keeps its own part of what they have together. While
    one of them has something pending, under way or soon to come, the reserves R of those are kept free: the
    bundles of the others keep to a cap of 1 - R, and where others are there, theirs to R. Else everybody may
    use the whole device: idle reserve is lent, and what was lent ends with the bundle that has it.

    ``Settings.isolation`` says how far that goes. With "off" there is no reserved lane and reserves do
    nothing; with "priority" there is one, and no cap is changed; "caps" is all of it; with "green" the lanes
    besides have multiprocessors of their own, and the others a second one for while a reserve is in use.
    """

    def __init__(self, predictor: Predictor | None = None) -> None:
        self.predictor = Predictor() if predictor is None else predictor
        self.common = OvertakingPolicy(self.predictor)
        self.reserved = FairPolicy(self.predictor, attrgetter("reserve"))
        self._reserves = Reserves()
        self._flying: set[Issue] = set()
        self._typical = _UNKNOWN
        self._mine: dict[Queue, None] = {}

    def form(self, view: View, now: float, settings: Settings) -> Decision:
        """A bundle of tenants with a reserve if one can go out, else one of the others."""
        lanes = view.lanes
        mine, fresh = self._new(view)
        if not mine and not self._reserves:
            usable = None if len(lanes) == 1 else _of(lanes, LaneKind.COMMON)
            return self.common.form(View(view.queues, lanes, usable, fresh), now, settings)
        rest = [queue for queue in view.queues if not queue.reserved]
        active = self._reserves.active(mine, now, self._typical)
        own = others = None
        if mine:
            usable = _of(lanes, LaneKind.RESERVED) or _of(lanes, LaneKind.COMMON)
            own = self.reserved.form(View(mine, lanes, usable, fresh), now, settings)
            if isinstance(own, Issue):
                return self._bounded(own, active, active, mine, _contended(lanes, rest), settings)
        if rest:
            confined = _of(lanes, LaneKind.CONFINED) if active else ()
            usable = confined or _of(lanes, LaneKind.COMMON)
            others = self.common.form(View(rest, lanes, usable, fresh), now, settings)
            if isinstance(others, Issue):
                return self._bounded(others, 1.0 - active, active, mine, active > 0.0, settings)
        return _both((own, mine), (others, rest))

    def everything(self, view: View, now: float, settings: Settings) -> Sequence[Issue]:
        """See :class:`Policy`; while a reserve is in use it is never so."""
        if self._reserves or self._mine or any(queue.reserved for queue in view.queues):
            return ()
        usable = None if len(view.lanes) == 1 else _of(view.lanes, LaneKind.COMMON)
        return self.common.everything(view._replace(usable=usable), now, settings)

    def _new(self, view: View) -> tuple[list[Queue], Collection[Queue] | None]:
        """The queues of tenants with a reserve; and what is still to be told of what is new.

        Each policy is told at once, whether it is asked this time or not.
        """
        if view.fresh is None:
            return [queue for queue in view.queues if queue.reserved], None
        for queue in view.fresh:
            if queue.reserved:
                self._mine[queue] = None
                self.reserved.note((queue,))
            else:
                self.common.note((queue,))
        if self._mine:
            self._mine = {queue: None for queue in self._mine if queue.requests}
        return list(self._mine), ()

    def _bounded(
        self,
        issue: Issue,
        most: float,
        kept: float,
        mine: Sequence[Queue],
        contended: bool,
        settings: Settings,
    ) -> Issue:
        """The issue with the cap that it may have, while so much is kept for tenants with a reserve."""
        hard = settings.isolation == "green" and issue.reserved
        share = issue.share
        if hard or (contended and settings.isolation != "priority"):
            share = min(share, max(_LEAST, most))
        return replace(issue, share=share, reserve=self._reserves.known(mine), kept=kept)

    def next_end(self) -> float | None:
        """See :class:`Policy`."""
        ends = (self.common.next_end(), self.reserved.next_end())
        return min((end for end in ends if end is not None), default=None)

    def issued(self, issue: Issue, now: float) -> None:
        """See :class:`Policy`."""
        if issue.reserved:
            self._flying.add(issue)
            self._reserves.issued(issue.requests, now)
            self.reserved.issued(issue, now)
            return
        if self._reserves:
            self._reserves.forget(now)
            where = context(issue.share, issue.neighbours)
            self._typical = self.predictor.forecast(issue.key, len(issue.requests), where).median
        self.common.issued(issue, now)

    def completed(self, issue: Issue, now: float, seconds: float, charge: float | None = None) -> None:
        """See :class:`Policy`."""
        if issue in self._flying:
            self._flying.remove(issue)
            self._reserves.completed(issue.requests)
        (self.reserved if issue.reserved else self.common).completed(issue, now, seconds, charge)

    def outlook(self, key: str, slots: int, bundles: int, now: float, reserved: bool = False) -> float | None:
        """See :class:`Policy`."""
        return (self.reserved if reserved else self.common).outlook(key, slots, bundles, now)

    def forget(self, key: str) -> None:
        """See :class:`Policy`."""
        self.common.forget(key)
        self.reserved.forget(key)


def _of(lanes: Sequence[LaneLoad], kind: LaneKind) -> tuple[int, ...]:
    return tuple([index for index, lane in enumerate(lanes) if lane.kind is kind])


def _contended(lanes: Sequence[LaneLoad], rest: Sequence[Queue]) -> bool:
    """Whether others than tenants with a reserve want the device, or have it."""
    return any(queue.ready for queue in rest) or any(
        lane.bundles for lane in lanes if lane.kind is not LaneKind.RESERVED
    )


def _both(*parts: tuple[Decision, Sequence[Queue]]) -> Decision:
    """What to do when neither of the two can send anything out now; a request of either asks again."""
    wake: dict[QueueName, int] = {}
    untils: list[float | None] = []
    busy = False
    for decision, queues in parts:
        if isinstance(decision, (Busy, Later)):
            full = {(queue.key, queue.reserved): _MANY for queue in queues}
            wake.update(full if decision.wake is None else decision.wake)
            untils.append(decision.until)
            busy = busy or isinstance(decision, Busy)
    known = [until for until in untils if until is not None]
    if not untils:
        return None
    if not busy:
        return Later(min(known), wake)
    return Busy(wake, min(known) if len(known) == len(untils) else None)

"""One decision under way: which programs may go out now, and what the others wait for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch_mux.runtime.scheduler.base import (
    Busy,
    Decision,
    Issue,
    LaneLoad,
    Later,
    Queue,
    QueueName,
    View,
    share_of,
)
from torch_mux.runtime.scheduler.cohorts import Cohorts
from torch_mux.settings import Settings

__all__ = ["Open", "Search", "at_once", "first_lane", "free_lane"]

_NEVER = float("inf")


class Open(NamedTuple):
    """A program that a bundle may be made of now.

    Attributes:
        limit: most slots of the bundle.
        neighbours: bundles under way on other lanes.
        branch: of the lane, if it has several.
    """

    queue: Queue
    lane: int
    limit: int
    neighbours: int
    branch: int | None = None


#: Until when (None: until a bundle has ended) and for how many companions a program is held, or None.
Hold = tuple["float | None", int]


@dataclass
class Search:
    """What has been found out so far.

    Attributes:
        lane_of: the lane of the next bundle of a program, or None where it is full.
        next_end: when the next bundle will probably have ended.
        wake: the queues that are held, and with how many requests they are not any longer.
        full: the queues whose lanes are.
    """

    view: View
    now: float
    settings: Settings
    lane_of: Callable[[Queue], int | None]
    next_end: Callable[[], float | None]
    wake: dict[QueueName, int] = field(default_factory=dict)
    full: set[QueueName] = field(default_factory=set)
    _until: float = _NEVER
    _flying: bool = False
    _due: float | None = None
    _unknown: bool = False
    _seen: dict[str, Open | None] = field(default_factory=dict)

    def opened(self, queue: Queue, held: Callable[[Open, Search], Hold | None]) -> Open | None:
        """The program if it may go out now."""
        key = queue.key
        if key in self._seen:
            return self._seen[key]
        lane = self.lane_of(queue)
        choice: Open | None = None
        if lane is None:
            self.full.add((key, queue.reserved))
        else:
            limit = max(1, min(self.settings.max_bundle, queue.slots))
            lanes = self.view.lanes
            choice = Open(queue, lane, limit, _neighbours(lanes, lane), lanes[lane].branch)
            hold = held(choice, self)
            if hold is not None:
                self.wake[key, queue.reserved] = min(limit, len(queue.requests) + hold[1])
                self.wait(hold[0])
                choice = None
        self._seen[key] = choice
        return choice

    def passes(self, queue: Queue) -> bool:
        """Whether others pass a program that is held for companions, or behind its own bundles."""
        name = (queue.key, queue.reserved)
        return name in self.wake or (name in self.full and not queue.ordered)

    def wait(self, moment: float | None, due: float | None = None) -> None:
        """Something is held until ``moment``, or (None) until a bundle has ended, which is ``due`` then."""
        if moment is None:
            self._flying = True
            self._unknown = self._unknown or due is None
            self._due = due if self._due is None or due is None else min(self._due, due)
        else:
            self._until = min(self._until, moment)

    def nothing(self) -> Decision:
        """Why nothing goes out."""
        if self._until < _NEVER:
            return Later(self._until, self.wake)
        if self._flying:
            return Busy(self.wake, None if self._unknown else self._due)
        return Busy(until=self.next_end()) if self.full else None


def at_once(
    queue: Queue,
    lane_of: Callable[[Queue], int | None],
    view: View,
    cohorts: Cohorts,
    now: float,
    settings: Settings,
    start: float | None = None,
) -> Issue | None:
    """All that is pending of a program, where no time, hold or part of the device has to be weighed.

    Args:
        lane_of: see :class:`Search`.
        cohorts: for how long programs are held for companions.
        start: of the issue.
    """
    count, limit = len(queue.requests), max(1, min(settings.max_bundle, queue.slots))
    if count > limit or queue.timed or settings.beside is not None:
        return None
    lane = lane_of(queue)
    if lane is None or (count < limit and cohorts.awaited(queue, now, settings) is not None):
        return None
    requests, branch = tuple(queue.requests), view.lanes[lane].branch
    beside = _neighbours(view.lanes, lane)
    return Issue(queue.key, requests, share_of(requests), lane, beside, start, queue.reserved, branch=branch)


def _neighbours(lanes: Sequence[LaneLoad], lane: int) -> int:
    """Bundles under way beside that lane."""
    if len(lanes) == 1:
        return 0
    return sum([load.bundles for load in lanes]) - lanes[lane].bundles


def free_lane(view: View, settings: Settings, home: int | None = None) -> int | None:
    """The least loaded usable lane, where it has room.

    Args:
        home: the branch that it must be of, if it has several; None: any.
    """
    lanes = view.lanes
    best, least = None, settings.in_flight
    for lane in range(len(lanes)) if view.usable is None else view.usable:
        load = lanes[lane]
        if load.bundles < least and (home is None or load.branch is None or load.branch == home):
            best, least = lane, load.bundles
            if not least:
                break
    return best


def first_lane(view: View, settings: Settings) -> int | None:
    """The first lane, where it has room."""
    return 0 if view.lanes[0].bundles < settings.in_flight else None

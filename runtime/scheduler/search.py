"""One decision under way: which programs may go out now, and what the others wait for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch_mux.runtime.scheduler.base import Busy, Decision, LaneLoad, Later, Queue, QueueName, View
from torch_mux.settings import Settings

__all__ = ["Open", "Search", "first_lane", "free_lane"]

_NEVER = float("inf")


class Open(NamedTuple):
    """A program that a bundle may be made of now.

    Attributes:
        limit: most slots of the bundle.
        neighbours: bundles under way on other lanes.
    """

    queue: Queue
    lane: int
    limit: int
    neighbours: int


#: Until when (None: until a bundle has ended) and for how many companions a program is held, or None.
Hold = tuple["float | None", int]


@dataclass
class Search:
    """What has been found out so far.

    Attributes:
        lanes: the lane of the next bundle, and that of an ordered one, or None where it is full.
        next_end: when the next bundle will probably have ended.
        wake: the queues that are held, and with how many requests they are not any longer.
    """

    view: View
    now: float
    settings: Settings
    lanes: tuple[int | None, int | None]
    next_end: Callable[[], float | None]
    wake: dict[QueueName, int] = field(default_factory=dict)
    _until: float = _NEVER
    _flying: bool = False
    _due: float | None = None
    _unknown: bool = False
    _full: bool = False
    _seen: dict[str, Open | None] = field(default_factory=dict)

    def opened(self, queue: Queue, held: Callable[[Open, Search], Hold | None]) -> Open | None:
        """The program if it may go out now."""
        key = queue.key
        if key in self._seen:
            return self._seen[key]
        lane = self.lanes[queue.ordered]
        choice: Open | None = None
        if lane is None:
            self._full = True
        else:
            limit = max(1, min(self.settings.max_bundle, queue.slots))
            choice = Open(queue, lane, limit, _neighbours(self.view.lanes, lane))
            hold = held(choice, self)
            if hold is not None:
                self.wake[key, queue.reserved] = min(limit, len(queue.requests) + hold[1])
                self.wait(hold[0])
                choice = None
        self._seen[key] = choice
        return choice

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
        return Busy(until=self.next_end()) if self._full else None


def _neighbours(lanes: Sequence[LaneLoad], lane: int) -> int:
    """Bundles under way beside that lane."""
    if len(lanes) == 1:
        return 0
    return sum([load.bundles for load in lanes]) - lanes[lane].bundles


def free_lane(view: View, settings: Settings) -> int | None:
    """The least loaded usable lane, where it has room."""
    lanes = view.lanes
    usable = range(len(lanes)) if view.usable is None else view.usable
    best = usable[0]
    for lane in usable:
        if lanes[lane].bundles < lanes[best].bundles:
            best = lane
    return best if lanes[best].bundles < settings.in_flight else None


def first_lane(view: View, settings: Settings) -> int | None:
    """The first lane, where it has room."""
    return 0 if view.lanes[0].bundles < settings.in_flight else None

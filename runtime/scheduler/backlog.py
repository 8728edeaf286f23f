"""When each lane will have finished what is enqueued on it, by forecast."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from torch_mux.runtime.scheduler.base import Issue, Ticket

__all__ = ["Backlog"]


@dataclass
class _Lane:
    """Bundles under way in order, and when the last of them will end."""

    flying: deque[tuple[Issue, float]] = field(default_factory=deque)
    free: float = float("-inf")


class Backlog:
    """The bundles under way on each lane; a lane runs them in order."""

    def __init__(self) -> None:
        self._lanes: dict[int, _Lane] = {}

    def issued(self, issue: Issue, now: float, seconds: float) -> None:
        """A bundle was enqueued that will take ``seconds``."""
        if issue.passes:
            for index, other in self._lanes.items():
                if index != issue.lane and other.flying:
                    other.free += seconds  # they stop for it
        lane = self._lanes.get(issue.lane)
        if lane is None:
            lane = self._lanes[issue.lane] = _Lane()
        lane.flying.append((issue, seconds))
        lane.free = max(lane.free, now) + seconds

    def completed(self, issue: Issue, now: float) -> None:
        """A bundle ended; one that is unknown changes nothing."""
        lane = self._lanes.get(issue.lane)
        if lane is None:
            return
        for entry in lane.flying:
            if entry[0] is issue:
                lane.flying.remove(entry)
                begin = now if issue.passes else self._stopped(now)
                lane.free = begin + sum([seconds for _, seconds in lane.flying])
                return

    def _stopped(self, now: float) -> float:
        """Until when bundles stop for those that overtake."""
        passing = [lane.free for lane in self._lanes.values() if lane.flying and lane.flying[0][0].passes]
        return max([now, *passing])

    def free_at(self, lane: int, now: float) -> float:
        """Seconds on the clock when a bundle enqueued now would begin; never before ``now``."""
        found = self._lanes.get(lane)
        return now if found is None or not found.flying else max(now, found.free)

    def tickets(self, lane: int) -> list[Ticket]:
        """What is under way on a lane."""
        found = self._lanes.get(lane)
        return [] if found is None else [ticket for issue, _ in found.flying for ticket in issue.requests]

    def next_end(self) -> float | None:
        """Seconds on the clock when the first of the bundles under way will end; None where there is none."""
        ends = [
            lane.free - sum([seconds for _, seconds in lane.flying]) + lane.flying[0][1]
            for lane in self._lanes.values()
            if lane.flying
        ]
        return min(ends, default=None)

    def begin(self, lane: int | None, now: float) -> float:
        """When a bundle would begin on a lane, or (None) on that which is free first; any thread may ask."""
        if lane is not None:
            return self.free_at(lane, now)
        return min(
            [max(now, lane.free) if lane.flying else now for lane in list(self._lanes.values())] or [now]
        )

"""Which branch of a lane each program's bundles go on, so that different programs' bundles overlap."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

from torch_mux.runtime.scheduler.base import Issue, LaneLoad, Queue, View
from torch_mux.runtime.scheduler.search import Open, Search, free_lane
from torch_mux.settings import Settings

__all__ = ["Homes", "branches_of", "part_of"]

#: Bundles that went out behind another program's, while a branch was idle, after which a program moves.
CROWDED: Final = 64
#: Seconds after which half of what a branch has done is forgotten.
_HALF: Final = 1.0
_LEAST: Final = 1 / 8
_RATE: Final = 1 / 4  # at which the part of its time that a program is charged is learned


class Homes:
    """Every program has a home, one branch, on which its bundles follow each other.

    A program that is new gets the branch that did least lately, of those the one with the fewest programs.
    One that again and again went out behind another program's bundle, while some branch was idle, moves
    there: its graphs are captured again on that branch, so this takes many bundles.
    """

    def __init__(self) -> None:
        self._homes: dict[str, int] = {}
        self._use: dict[int, tuple[float, float]] = {}
        self._met: Counter[str] = Counter()
        self._flying: dict[int, Counter[str]] = {}
        self._lanes: dict[str, int] = {}
        self._seconds: dict[str, float] = {}
        self._parts: dict[str, float] = {}
        self._count = 1

    def lane_of(
        self, view: View, settings: Settings, now: float, lanes: tuple[int | None, int | None]
    ) -> Callable[[Queue], int | None]:
        """What names the lane of a program's next bundle, or None where that is full.

        Args:
            lanes: where any program may go and where an ordered one must, if there is room.
        """
        free, first = lanes
        count = branches_of(view.lanes)
        if not count:
            return lambda queue: first if queue.ordered else free
        self._count = count
        return lambda queue: (
            first if queue.ordered else free_lane(view, settings, self.of(queue.key, count, now))
        )

    def settled(self, view: View) -> bool:
        """Whether each pending program has a home, where there are branches."""
        count = branches_of(view.lanes)
        return not count or all(self._homes.get(queue.key, count) < count for queue in view.queues)

    def of(self, key: str, count: int, now: float) -> int:
        """The branch of a program, of so many; of one that is new, the branch that it would get now."""
        home = self._homes.get(key)
        return self._best(count, now) if home is None or home >= count else home

    def others(self, choice: Open, search: Search, seconds: Callable[[Queue], float]) -> list[float]:
        """What the bundles of all other branches will take: those under way, else the longest pending."""
        branch, count = choice.branch, branches_of(search.view.lanes)
        found: dict[int, float] = {}
        for queue in search.view.queues:
            home = self.of(queue.key, count, search.now)
            if queue.ready and home != branch:
                found[home] = max(found.get(home, 0.0), seconds(queue))
        for home, flying in self._flying.items():
            if flying and home != branch:
                found[home] = max(self._seconds.get(key, 0.0) for key in flying)
        return list(found.values())

    def _best(self, count: int, now: float) -> int:
        taken = Counter(self._homes.values())
        return min(range(count), key=lambda branch: (self._used(branch, now), taken[branch], branch))

    def _used(self, branch: int, now: float) -> float:
        seconds, noted = self._use.get(branch, (0.0, now))
        return seconds * math.pow(0.5, max(0.0, now - noted) / _HALF)

    def lane(self, key: str) -> int | None:
        """The lane on which a program's last bundle went, if that is one of its home's."""
        return self._lanes.get(key)

    def issued(self, issue: Issue, now: float, seconds: float) -> None:
        """A bundle that will take ``seconds`` goes out; its program lives on that branch from now on."""
        key, branch = issue.key, issue.branch
        if branch is None:
            return
        self._count = max(self._count, branch + 1)
        self._homes[key] = branch
        self._lanes[key], self._seconds[key] = issue.lane, seconds
        self._use[branch] = self._used(branch, now) + seconds, now
        flying = self._flying.get(branch)
        if flying is None:
            flying = self._flying[branch] = Counter()
        crowded = len(flying) > (key in flying)
        idle = [one for one in range(self._count) if not self._flying.get(one)] if crowded else ()
        if idle:
            self._met[key] += 1
            if self._met[key] >= CROWDED:
                del self._met[key]
                self._homes[key] = min(idle, key=lambda one: (self._used(one, now), one))
        elif key in self._met:
            self._met[key] -= 1
            if not self._met[key]:
                del self._met[key]
        flying[key] = flying.get(key, 0) + 1

    def part(self, issue: Issue) -> float:
        """What part of its time a bundle of that program was charged lately, since others overlapped."""
        return 1.0 if issue.branch is None else self._parts.get(issue.key, 1.0)

    def completed(self, issue: Issue, seconds: float = 0.0, charge: float | None = None) -> float:
        """It ended after ``seconds``, or (0) did not run; returns what its tenants are charged.

        Args:
            charge: its part of the time in which the device was busy, where that is known.
        """
        flying = self._flying.get(-1 if issue.branch is None else issue.branch)
        if flying is not None and flying[issue.key] > 0:
            flying[issue.key] -= 1
            if not flying[issue.key]:
                del flying[issue.key]
        if issue.branch is None or charge is None or seconds <= 0.0:
            return seconds
        before = self._parts.get(issue.key, 1.0)
        self._parts[issue.key] = before + _RATE * (min(1.0, charge / seconds) - before)
        return charge

    def forget(self, key: str) -> None:
        """The program was dropped."""
        self._homes.pop(key, None)
        self._lanes.pop(key, None)
        self._seconds.pop(key, None)
        self._parts.pop(key, None)
        self._met.pop(key, None)


def branches_of(lanes: Sequence[LaneLoad]) -> int:
    """How many branches the lanes have; 0: a program may go on any lane."""
    return 1 + max([-1 if lane.branch is None else lane.branch for lane in lanes])


def part_of(seconds: float, others: Sequence[float], total: float | None) -> float:
    """The part of the device that a bundle keeps to beside others.

    It grows with the time that the bundle needs, so that all of them end together: with equal parts the
    longest would be last by far, on a device that is idle otherwise. Nobody's is below an eighth of the
    largest: a short one beside a long one would wait for the end of every launch of that.

    Args:
        seconds: what it will take, alone.
        others: what the bundle at work, or next, on each other branch will.
        total: what all parts are together, in devices; None: each may use all of it.
    """
    if total is None or not others:
        return 1.0
    longest = max(seconds, *others)
    parts = [max(_LEAST * longest, each) for each in (seconds, *others)]
    return min(1.0, total * parts[0] / sum(parts)) if longest > 0.0 else 1.0

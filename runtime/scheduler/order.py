"""The pending programs by class and least start tag, so that a decision does not look at each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from heapq import heappop, heappush, heapreplace
from itertools import count

from torch_mux.runtime.scheduler.base import Queue
from torch_mux.runtime.scheduler.fair import VirtualTime
from torch_mux.runtime.scheduler.formation import Turns
from torch_mux.types import Quota

__all__ = ["Order", "Place"]

#: Start tag, age, a number that tells equal ones apart, the program.
Place = tuple[float, int, int, Turns]

_NEVER = float("inf")


class Order:
    """A heap of programs for each class.

    What is pending of a program gets a lesser tag only by requests that are new, and then :meth:`put` is
    called. All other changes make it greater, so a place that is wrong comes to the top too early and is put
    right there: a decision costs the logarithm of the number of programs, not the number.
    """

    def __init__(self, weight: Callable[[Quota], float]) -> None:
        self._weight = weight
        self._heaps: dict[int, list[Place]] = {}
        self._turns: dict[str, Turns] = {}
        self._places: dict[Turns, dict[int, Place]] = {}
        self._unready: dict[str, Queue] = {}
        self._numbers = count()

    def put(self, queue: Queue, times: Callable[[int], VirtualTime]) -> None:
        """Something new is pending in ``queue``.

        Args:
            times: the virtual time of a class.
        """
        if not queue.ready:
            self._unready[queue.key] = queue
            return
        turns = self._turns.get(queue.key)
        if turns is None or turns.queue is not queue:
            self.forget(queue.key)
            turns = self._turns[queue.key] = Turns(queue, self._weight)
            self._places[turns] = {}
        places = self._places[turns]
        for level in turns.stir(times):
            found = turns.first(level)
            if found is not None:
                former = places.get(level)
                if former is None or found[:2] < former[:2]:
                    place = places[level] = (found[0], found[1], next(self._numbers), turns)
                    heappush(self._heaps.setdefault(level, []), place)

    def wake(self, times: Callable[[int], VirtualTime]) -> None:
        """Takes in the programs whose plans have come."""
        if self._unready:
            for queue in [queue for queue in self._unready.values() if queue.ready]:
                del self._unready[queue.key]
                self.put(queue, times)

    def levels(self) -> Iterable[int]:
        """The classes, highest first; some may have nothing pending."""
        return self._heaps if len(self._heaps) == 1 else sorted(self._heaps, reverse=True)

    def turns(self, key: str) -> Turns | None:
        """What is known of a program that may have something pending."""
        return self._turns.get(key)

    def pick(self, level: int, accept: Callable[[Turns, float], bool]) -> Place | None:
        """The first program of a class that ``accept(turns, start tag)`` says yes to, in order."""
        passed: list[Place] = []
        heap = self._heaps.get(level, [])
        while (found := self._top(heap, level)) is not None and not accept(found[3], found[0]):
            passed.append(heappop(heap))
        for place in passed:
            heappush(heap, place)
        return found

    def least(self, level: int, but: Turns) -> float | None:
        """The least start tag of a class, without one program."""
        heap = self._heaps.get(level)
        place = self._top(heap, level) if heap else None
        if heap is None or place is None or place[3] is not but:
            return None if place is None else place[0]
        heappop(heap)
        second = self._top(heap, level)
        heappush(heap, place)
        return None if second is None else second[0]

    def ceilings(self, turns: Turns, absent: Mapping[int, float]) -> tuple[dict[int, float], int | None]:
        """Start tags by class up to which a program's bundle may go, and the highest class of other programs.

        Args:
            absent: by class, the least start tag of those that are expected back.
        """
        found: dict[int, float] = {}
        top: int | None = None
        for level in self.levels():
            least, tag = self.least(level, turns), absent.get(level)
            if least is not None:
                found[level] = least
                top = level if top is None else max(top, level)
            if tag is not None and (own := turns.first(level)) is not None:
                # He need not wait for who is absent, so his bundle is not cut for their sake.
                found[level] = min(found.get(level, _NEVER), max(tag, own[0]))
        return found, top

    def _top(self, heap: list[Place], level: int) -> Place | None:
        while heap:
            place = heap[0]
            tag, seq, _, turns = place
            places = self._places.get(turns)
            if places is None or places.get(level) is not place:
                heappop(heap)
                continue
            found = turns.first(level)
            if found is None or not turns.queue.ready:
                heappop(heap)
                del places[level]
                if found is not None:
                    self._unready[turns.queue.key] = turns.queue
            elif found[0] != tag or found[1] != seq:
                place = places[level] = (found[0], found[1], next(self._numbers), turns)
                heapreplace(heap, place)
            else:
                return place
        return None

    def members(self, level: int) -> set[str]:
        """Tenants of a class that may have something pending."""
        return {name for turns in self._places for priority, name in turns.members if priority == level}

    def forget(self, key: str) -> None:
        """A program was dropped."""
        self._unready.pop(key, None)
        turns = self._turns.pop(key, None)
        if turns is not None:
            del self._places[turns]

    def __len__(self) -> int:
        return len(self._turns)

    def clear(self) -> None:
        """Nothing that could run is pending any more."""
        self._heaps.clear()
        self._turns.clear()
        self._places.clear()

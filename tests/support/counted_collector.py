"""A stand-in for Python's ``gc`` that counts as CPython does and takes time on a told clock."""

from __future__ import annotations

from clocks import Told

__all__ = ["CountedCollector"]


class CountedCollector:
    """Three generations of objects, all of them alive but for those that are made as garbage.

    Attributes:
        done: (generation, whether Python did it, the moment) of each collection.
        garbage: what is not collected yet, by the generation that it is in.
    """

    def __init__(self, clock: Told, pace: float = 200e-9) -> None:
        self._clock = clock
        self._pace = pace
        self._thresholds = (700, 10, 10)
        self._counts = [0, 0, 0]
        self._objects = [0, 0, 0]
        self._pending = 0
        self.garbage = [0, 0, 0]
        self.enabled = True
        self.done: list[tuple[int, bool, float]] = []

    def isenabled(self) -> bool:
        return self.enabled

    def get_threshold(self) -> tuple[int, int, int]:
        return self._thresholds

    def set_threshold(self, young: int, middle: int, old: int) -> None:
        self._thresholds = young, middle, old

    def get_count(self) -> tuple[int, int, int]:
        young, middle, old = self._counts
        return young, middle, old

    def make(self, count: int, garbage: int = 0) -> None:
        """New objects; the first of them only a collection ends."""
        while count:
            limit = self._thresholds[0]
            room = max(1, limit + 1 - self._counts[0]) if limit and self.enabled else count
            now = min(count, room)
            count -= now
            self._counts[0] += now
            self._objects[0] += now
            self.garbage[0] += min(now, garbage)
            garbage -= min(now, garbage)
            if self.enabled and limit and self._counts[0] > limit:
                self._automatic()

    def _automatic(self) -> None:
        for generation in (2, 1, 0):
            enough = generation < 2 or self._pending >= self._objects[2] / 4
            if self._counts[generation] > self._thresholds[generation] and enough:
                self._run(generation, True)
                return

    def collect(self, generation: int = 2, /) -> int:
        return self._run(generation, False)

    def _run(self, generation: int, automatic: bool) -> int:
        looked = sum(self._objects[: generation + 1])
        gone = sum(self.garbage[: generation + 1])
        for younger in range(generation + 1):
            self._objects[younger] = self.garbage[younger] = self._counts[younger] = 0
        older = min(2, generation + 1)
        self._objects[older] += looked - gone
        if generation < 2:
            self._counts[older] += 1
        self._pending = 0 if generation == 2 else self._pending + (looked - gone) * (generation == 1)
        self._clock.now += looked * self._pace
        self.done.append((generation, automatic, self._clock.now))
        return gone

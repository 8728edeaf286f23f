"""How long a bundle will take, learned from those that the device has finished."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field

__all__ = ["Forecast", "Predictor"]

_WINDOW = 32
_HIGH = 0.9
#: What a slot is taken to cost before any bundle of its program was measured.
_UNKNOWN = 1e-3


@dataclass(frozen=True)
class Forecast:
    """Device seconds of a bundle.

    Attributes:
        median: what half of such bundles took at most.
        high: what nine of ten took at most.
        known: whether bundles of this program have been measured.
    """

    median: float
    high: float
    known: bool = True


class _Size:
    """The last measurements of bundles of one size."""

    __slots__ = ("forecast", "samples")

    def __init__(self) -> None:
        self.samples: deque[float] = deque(maxlen=_WINDOW)
        self.forecast = Forecast(0.0, 0.0)

    def observe(self, seconds: float, first: bool) -> None:
        if first:
            self.samples.clear()
        self.samples.append(seconds)
        ordered = sorted(self.samples)
        count = len(ordered)
        high = ordered[min(count - 1, int(_HIGH * count))]
        self.forecast = Forecast(ordered[(count - 1) // 2], high)


@dataclass
class _Program:
    """What is known of one program: by number of neighbours, then by slots."""

    sizes: dict[int, dict[int, _Size]] = field(default_factory=dict)
    cache: dict[tuple[int, int], Forecast] = field(default_factory=dict)
    counts: dict[tuple[int, int], int] = field(default_factory=dict)


class Predictor:
    """Latency of bundles by program, slots and neighbours, on line.

    A running quantile over the last 32 bundles of a size, so that a straggler changes nothing. The first
    bundle of a size may include what happens once, and counts only until there is a second. Sizes that were
    not seen are interpolated linearly between their neighbours; below the smallest one its own time is taken,
    above the largest one time grows in proportion to the slots. A number of neighbours that was not seen is
    taken from the nearest one that was.
    """

    def __init__(self) -> None:
        self._programs: dict[str, _Program] = {}

    def observe(self, key: str, slots: int, neighbours: int, seconds: float) -> None:
        """A bundle of ``slots`` took ``seconds`` of the device beside that many bundles on other lanes."""
        program = self._programs.get(key)
        if program is None:
            program = self._programs[key] = _Program()
        sizes = program.sizes.setdefault(neighbours, {})
        size = sizes.get(slots)
        if size is None:
            size = sizes[slots] = _Size()
        count = program.counts.get((neighbours, slots), 0)
        program.counts[neighbours, slots] = count + 1
        size.observe(seconds, first=count == 1)
        program.cache.clear()

    def forecast(self, key: str, slots: int, neighbours: int = 0) -> Forecast:
        """What a bundle will take; a millisecond a slot where nothing is known of the program."""
        program = self._programs.get(key)
        if program is None:
            return Forecast(_UNKNOWN * slots, _UNKNOWN * slots, known=False)
        found = program.cache.get((slots, neighbours))
        if found is None:
            nearest = min(program.sizes, key=lambda other: (abs(other - neighbours), other))
            found = program.cache[slots, neighbours] = _interpolated(program.sizes[nearest], slots)
        return found

    def forget(self, key: str) -> None:
        """Drops what is known of a program."""
        self._programs.pop(key, None)


def _interpolated(sizes: dict[int, _Size], slots: int) -> Forecast:
    known = sorted(sizes)
    place = bisect_left(known, slots)
    if place == len(known):
        last = sizes[known[-1]].forecast
        ratio = slots / known[-1]
        return Forecast(last.median * ratio, last.high * ratio)
    above = sizes[known[place]].forecast
    if place == 0 or known[place] == slots:
        return above
    below = sizes[known[place - 1]].forecast
    part = (slots - known[place - 1]) / (known[place] - known[place - 1])
    return Forecast(
        below.median + part * (above.median - below.median), below.high + part * (above.high - below.high)
    )

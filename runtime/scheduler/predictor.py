"""How long a bundle will take, learned from those that the device has finished."""

from __future__ import annotations

import math
import threading
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["UNKNOWN", "Context", "Forecast", "Predictor", "Samples", "context"]

_WINDOW = 32
_HIGH = 0.9
_ENOUGH = 3
#: What a slot is taken to cost before any bundle of its program was measured.
UNKNOWN = 1e-3
_CAPS = 16

#: (cap in sixteenths of the device, bundles under way on other lanes).
Context = tuple[int, int]
#: Measured seconds of bundles, by program, context and slots.
Samples = Mapping[str, Mapping[Context, Mapping[int, Sequence[float]]]]


def context(share: float, neighbours: int) -> Context:
    """What besides program and slots decides how long a bundle takes."""
    return max(1, math.ceil(share * _CAPS - 1e-9)), neighbours


@dataclass(frozen=True)
class Forecast:
    """Device seconds of a bundle.

    Attributes:
        median: what half of such bundles took at most.
        high: what nine of ten took at most.
        known: whether there are measurements enough to refuse somebody for.
    """

    median: float
    high: float
    known: bool = True


class _Size:
    """The last measurements of bundles of one size."""

    __slots__ = ("_ordered", "count", "forecast", "samples")

    def __init__(self, samples: Sequence[float] = ()) -> None:
        self.samples: deque[float] = deque(samples, maxlen=_WINDOW)
        self.count = len(samples)
        self.forecast = Forecast(0.0, 0.0, known=False)
        self._ordered = sorted(self.samples)
        if samples:
            self._renew()

    def observe(self, seconds: float) -> None:
        ordered, samples = self._ordered, self.samples
        if self.count == 1:
            samples.clear()
            ordered.clear()
        elif len(samples) == _WINDOW:
            del ordered[bisect_left(ordered, samples[0])]
        self.count += 1
        samples.append(seconds)
        insort(ordered, seconds)
        self._renew()

    def _renew(self) -> None:
        ordered = self._ordered
        count = len(ordered)
        high = ordered[min(count - 1, int(_HIGH * count))]
        self.forecast = Forecast(ordered[(count - 1) // 2], high, known=count >= _ENOUGH)


@dataclass
class _Program:
    """What is known of one program, and what was asked about it since it was last measured."""

    contexts: dict[Context, dict[int, _Size]] = field(default_factory=dict)
    cache: dict[tuple[int, Context], Forecast] = field(default_factory=dict)
    measured: bool = False

    def known(self, slots: int, where: Context) -> _Size | None:
        """What was measured of just such bundles."""
        sizes = self.contexts.get(where)
        return None if sizes is None else sizes.get(slots)


class Predictor:
    """Latency of bundles by program, slots, cap and neighbours, on line; safe from any thread.

    A running quantile over the last 32 bundles of a size, so that a straggler changes nothing. The first
    bundle of a size may include what happens once, and counts only until there is a second. Sizes that were
    not seen are interpolated linearly between their neighbours; below the smallest one its own time is taken,
    above the largest one time grows in proportion to the slots. A cap or number of neighbours that was not
    seen is taken from the nearest that was, neighbours first; under a larger cap than that it is taken to be
    faster in proportion, since who is charged too little is put right at once, and too much only later.
    """

    def __init__(self, samples: Samples | None = None) -> None:
        self._lock = threading.Lock()
        self._programs: dict[str, _Program] = {}
        for key, contexts in (samples or {}).items():
            program = self._programs[key] = _Program()
            for where, sizes in contexts.items():
                program.contexts[where] = {slots: _Size(found) for slots, found in sizes.items()}

    def observe(self, key: str, slots: int, where: Context, seconds: float) -> None:
        """A bundle of ``slots`` took ``seconds`` of the device."""
        with self._lock:
            program = self._programs.get(key)
            if program is None:
                program = self._programs[key] = _Program()
            size = program.known(slots, where)
            if size is None:
                program.contexts.setdefault(where, {})[slots] = _Size((seconds,))
            else:
                size.observe(seconds)
            if program.cache:
                program.cache = {}
            program.measured = True

    def forecast(self, key: str, slots: int, where: Context) -> Forecast:
        """What a bundle will take; a millisecond a slot where nothing is known of the program."""
        program = self._programs.get(key)
        if program is None:
            return Forecast(UNKNOWN * slots, UNKNOWN * slots, known=False)
        size = program.known(slots, where)
        if size is not None:
            return size.forecast
        found = program.cache.get((slots, where))
        if found is not None:
            return found
        with self._lock:
            cap, neighbours = where
            nearest = min(
                program.contexts, key=lambda other: (abs(other[1] - neighbours), abs(other[0] - cap))
            )
            found = _interpolated(program.contexts[nearest], slots)
            if cap > nearest[0]:
                part = nearest[0] / cap
                found = Forecast(found.median * part, found.high * part, found.known)
            program.cache[slots, where] = found
            return found

    def fresh(self) -> Samples:
        """What is known of the programs that were measured here, as plain data."""
        with self._lock:
            return {
                key: {
                    where: {slots: list(size.samples) for slots, size in sizes.items()}
                    for where, sizes in program.contexts.items()
                }
                for key, program in self._programs.items()
                if program.measured
            }

    def forget(self, key: str) -> None:
        """Drops what is known of a program."""
        with self._lock:
            self._programs.pop(key, None)


def _interpolated(sizes: dict[int, _Size], slots: int) -> Forecast:
    known = sorted(sizes)
    place = bisect_left(known, slots)
    if place == len(known):
        last = sizes[known[-1]].forecast
        ratio = slots / known[-1]
        return Forecast(last.median * ratio, last.high * ratio, last.known)
    above = sizes[known[place]].forecast
    if place == 0 or known[place] == slots:
        return above
    below = sizes[known[place - 1]].forecast
    part = (slots - known[place - 1]) / (known[place] - known[place - 1])
    return Forecast(
        below.median + part * (above.median - below.median),
        below.high + part * (above.high - below.high),
        below.known and above.known,
    )

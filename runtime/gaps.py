"""Python's garbage is collected in the moments in which no device has anything to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from torch_mux.compat import Rest

__all__ = ["Gaps"]

_NEVER = float("inf")
#: Seconds between two looks where nothing is due: who calls on his own thread tells nobody when he is done.
_LOOK: Final = 1.0
#: New objects that are worth a collection of the youngest, and such collections that are worth one of the
#: middle generation.
_YOUNG: Final = 500
_MIDDLE: Final = 2
#: Seconds that an object takes to be looked through, rather more than less.
_PACE: Final = 300e-9
#: Least seconds without a request before the youngest, the middle and all objects are looked through.
_IDLE: Final = (200e-6, 10e-3, 1.0)
#: How many times as long as its last collection took a generation waits for: the next one may take that long.
_PATIENCE: Final = (0.0, 4.0, 10.0)
#: Of the time at most for full collections.
_SHARE: Final = 0.01


class Gaps:
    """When to collect what, for threads that have nothing else to do.

    The longer nothing was pending or under way on any device, the older are the objects that are looked
    through, since a gap that has lasted for some time will probably last as long again: the youngest (at
    least 500 new ones) after 0.2 ms, or the time that this many take; the middle generation after 10 ms; all
    of them after a second, and then when there is something new, for a hundredth of the time at most. Under
    load without such gaps Python collects by the thresholds of :data:`torch_mux.compat.SERVING`. No thread
    that calls a model collects here.

    Args:
        idle: seconds for which nothing has been pending or under way; negative while something is.
        rest: whose thresholds hold meanwhile.
        clock: seconds; on which gaps and collections are timed.
    """

    def __init__(
        self,
        idle: Callable[[], float],
        rest: Rest,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._idle = idle
        self._rest = rest
        self._clock = clock
        self._on = False
        self._took = [0.0, 0.0, 0.0]
        self._full = -_NEVER  # when the last full collection began

    def follow(self, on: bool) -> bool:
        """Collects in gaps from now on, or leaves all to Python as it was; returns whether that is new."""
        changed, self._on = on != self._on, on
        if changed:
            self._rest.serve(on)
        return changed

    def wait(self) -> float:
        """Seconds without a request after which to :meth:`tend`; infinite where Python collects by itself."""
        if not self._on:
            return _NEVER
        if not self._rest.given():
            return _LOOK
        idle = self._idle()
        if idle < 0.0:  # whoever sees the end of what is under way looks then
            return _LOOK
        return min([_LOOK, *[max(0.0, needed - idle) for _, needed in self._due(idle)]])

    def tend(self) -> None:
        """Collects what is due in the gap that there is now, if there is one."""
        if not (self._on and self._rest.given()):
            return
        idle = self._idle()
        due = [generation for generation, needed in self._due(idle) if needed <= idle]
        if due:
            self._collect(max(due))

    def _due(self, idle: float) -> list[tuple[int, float]]:
        """(Generation, for how many seconds nothing must have come) of what is worth a collection."""
        young, middle, old = self._rest.collector.get_count()
        needed = [max(least, young * _PACE) for least in _IDLE]
        due: list[tuple[int, float]] = []
        if young >= _YOUNG:
            due.append((0, needed[0]))
        if middle >= _MIDDLE:
            due.append((1, max(needed[1], _PATIENCE[1] * self._took[1])))
        now = self._clock()
        if young >= _YOUNG or middle or old or self._full < now - idle:  # or not yet in this gap
            again = self._full + self._took[2] / _SHARE - now + idle
            due.append((2, max(needed[2], _PATIENCE[2] * self._took[2], again)))
        return due

    def _collect(self, generation: int) -> None:
        begun = self._clock()
        self._rest.collector.collect(generation)
        self._took[generation] = self._clock() - begun
        if generation == 2:
            self._full = begun

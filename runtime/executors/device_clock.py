"""When the device reached an event, in seconds on the host's clock."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torch_mux.runtime.lanes import Mark

__all__ = ["DeviceClock"]

#: Seconds after which time is counted from a later event: CUDA tells intervals as 32-bit numbers.
_LONGEST: Final = 1.0


class DeviceClock:
    """Places events of one device in time, all on one scale: how they lie to each other is the device's word.

    Where that scale lies on the host's clock is known within limits: nothing ended after it was seen, and
    nothing began before it was enqueued. It is moved no more than these ask for.
    """

    def __init__(self) -> None:
        self._origin: Mark | None = None
        self._at = 0.0
        self._last: tuple[Mark | None, tuple[float, float]] = (None, (0.0, 0.0))

    def ended(self, start: Mark, end: Mark, launched: float, now: float) -> tuple[float, float]:
        """(when the device reached ``end``, seconds since it reached ``start``).

        Args:
            start, end: both reached. Asked for the same ``end`` again, as for bundles that are one, it says
                the same.
            launched: when the host began to enqueue what lies between them.
            now: after ``end`` was seen to be reached.

        Raises:
            RuntimeError: what CUDA says.
        """
        if self._last[0] is not end:
            self._last = end, self._placed(start, end, launched, now)
        return self._last[1]

    def known(self, end: Mark) -> bool:
        """Whether ``end`` is what was asked for last, so that it was reached."""
        return self._last[0] is end

    def _placed(self, start: Mark, end: Mark, launched: float, now: float) -> tuple[float, float]:
        seconds = _seconds(start, end)
        if self._origin is None:
            self._origin, self._at = end, min(now, launched + seconds)
            return self._at, seconds
        passed = _seconds(self._origin, end)
        self._at = max(min(self._at, now - passed), launched + seconds - passed)
        reached = self._at + passed
        if passed > _LONGEST:
            self._origin, self._at = end, reached
        return min(reached, now), seconds

    def reached(self, mark: Mark, now: float) -> float:
        """When the device reached ``mark``, which it has, as far as is known by now."""
        return now if self._origin is None else min(now, self._at + _seconds(self._origin, mark))


def _seconds(first: Mark, then: Mark) -> float:
    """Negative where ``then`` was reached earlier."""
    return float(first.event.elapsed_time(then.event)) * 1e-3

"""How fast the bundles of a queue really go out and end, host and all, learned from those that did."""

from __future__ import annotations

__all__ = ["Pace"]

_NEVER = float("inf")
#: The shape is that of about 64 bundles, the pace that of the last 4, the rate that of 16.
_SHAPE, _PACE, _RATE = 1 / 64, 1 / 4, 1 / 16
#: Sizes that differ by less of their mean say nothing about the slope.
_SPREAD = 0.05
#: What takes many times as long as was expected counts as no more than that: the clock may have jumped.
_MOST = 3.0
_ENOUGH = 3
_IDLE = 1.0


class _Line:
    """Seconds by slots: a straight line through the last bundles, times how long the very last ones took."""

    __slots__ = ("_count", "_n", "_nn", "_ny", "_pace", "_seen", "_y")

    def __init__(self) -> None:
        self._seen = 0
        self._restart()

    def _restart(self) -> None:
        self._count = self._n = self._y = self._nn = self._ny = 0.0
        self._pace = 1.0

    @property
    def known(self) -> bool:
        """Whether there are measurements enough to refuse somebody for."""
        return self._seen >= _ENOUGH

    def observe(self, slots: int, seconds: float) -> None:
        """A bundle of so many slots took so long."""
        expected = 0.0
        if self._seen == 1:
            self._restart()  # the first one may include what happens once
        elif self._seen:
            expected = self(slots)
            seconds = min(seconds, _MOST * expected) if expected > 0.0 else seconds
        self._seen += 1
        keep = 1.0 - _SHAPE
        self._count = self._count * keep + 1.0
        self._n = self._n * keep + slots
        self._y = self._y * keep + seconds
        self._nn = self._nn * keep + slots * slots
        self._ny = self._ny * keep + slots * seconds
        shape = self._shape(slots)
        if expected > 0.0 and shape > 0.0:
            self._pace = (expected + _PACE * (seconds - expected)) / shape

    def _shape(self, slots: float) -> float:
        """Never steeper than in proportion to the slots; that, where all had one size and this is larger."""
        n, y = self._n / self._count, self._y / self._count
        variance = self._nn / self._count - n * n
        slope = y / n if slots > n else 0.0
        if variance > (_SPREAD * n) ** 2:
            slope = min(y / n, max(0.0, (self._ny / self._count - n * y) / variance))
        return y + slope * (slots - n)

    def __call__(self, slots: float) -> float:
        """Seconds that a bundle of so many slots will probably take."""
        return self._pace * self._shape(slots)


class Pace:
    """The bundles of one queue; who dispatches tells, any thread may ask.

    *Gap* is how long after a bundle the next one goes out where there was something to send out all the time,
    whether the host or the device takes it; *service* is from there to its end.
    """

    __slots__ = ("_between", "_full", "_gap", "_last", "_left", "_service", "_size", "_slots", "_turn")

    def __init__(self) -> None:
        self._gap, self._service = _Line(), _Line()
        self._last, self._slots, self._left, self._turn = -_NEVER, 0, 0, 0
        self._between = self._size = 0.0
        self._full = _NEVER

    def issued(self, slots: int, left: int, turn: int, now: float) -> None:
        """A bundle goes out.

        Args:
            left: requests that are left behind in the queue.
            turn: how many bundles of any queue went out and how often there was nothing to send, before.
        """
        gap = now - self._last
        if 0.0 <= gap < _NEVER:
            if self._left or turn == self._turn or (self._gap.known and gap < self._gap(self._slots)):
                self._gap.observe(self._slots, gap)
            self._between += _RATE * (min(gap, _IDLE) - self._between)
            self._size += _RATE * (self._slots - self._size)
        if not left:
            self._full = max(self._full, slots)
        elif self._full < _NEVER:
            self._full += _PACE * (slots - self._full)
        else:
            self._full = slots
        self._last, self._slots, self._left, self._turn = now, slots, left, turn + 1

    def ended(self, slots: int, seconds: float) -> None:
        """A bundle has ended, so many seconds after it went out."""
        if seconds > 0.0:
            self._service.observe(slots, seconds)

    def most(self, limit: int) -> int:
        """Requests of a bundle that leaves some behind, at most ``limit``: others may go in between."""
        return max(1, min(limit, int(self._full))) if self._full < _NEVER else limit

    def _rate(self) -> float:
        return self._size / self._between if self._between > 0.0 else 0.0

    def load(self, most: int) -> float:
        """Part of the requests that could have gone out lately, in bundles of ``most``, that did."""
        return min(1.0, self._rate() * self._gap(most) / most) if self._gap.known else 0.0

    def seconds(self, ahead: int, most: int, now: float) -> float | None:
        """Until a request would have ended that comes now, behind so many; None while too little is known.

        Those who will come while it waits share its bundle.

        Args:
            most: requests of one bundle.
        """
        gap, service = self._gap, self._service
        if not service.known:
            return None
        full, wait = ahead // most, 0.0
        if gap.known:
            wait = max(0.0, gap(self._slots) - max(0.0, now - self._last)) + full * gap(most)
        elif full:
            wait = full * service(most)
        return wait + service(min(most, ahead % most + 1 + self._rate() * wait))

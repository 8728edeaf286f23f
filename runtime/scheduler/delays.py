"""By how much requests took longer than forecast, and who is refused for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

__all__ = ["Delay"]

_NEVER = float("inf")
#: The usual error is that of the last 15 bundles; the worst one is forgotten over about 64.
_WINDOW, _FORGETS = 15, 1 / 64
#: From this load on time is kept free for what no forecast knows; at most so much of the deadline.
_BUSY, _PART = 0.8, 0.5
#: Seconds for which what refuses is trusted, at least and at most.
_TRUST, _LONGEST = 20e-3, 1.0
#: So much of the weight of tenants that had something pending is forgotten with each request.
_FADES = 1 / 256


class Delay:
    """The requests of one class of one queue; any thread may ask, who dispatches tells.

    What is refused teaches nothing. So when nothing has ended for a while one request is let through to see,
    and again after twice that time if it took as long as was feared.
    """

    __slots__ = ("_asked", "_beyond", "_error", "_errors", "_rivals", "_seen", "_trust")

    def __init__(self) -> None:
        self._error = self._beyond = self._trust = self._rivals = 0.0
        self._seen, self._asked = -_NEVER, False
        self._errors: deque[float] = deque(maxlen=_WINDOW)

    def among(self, rivals: float) -> float:
        """The weight of others, over an asker's own, that he competes with who finds these pending.

        A queue that was just emptied has had more of them.
        """
        self._rivals = max(rivals, self._rivals * (1.0 - _FADES))
        return self._rivals

    def most(self, seconds: float, limit: float, load: float) -> float:
        """Seconds that a request may take.

        That is what it will take by forecast, the median error of that, and the worst one beyond it. For the
        last no more than half of the limit is kept free: a host with stalls would else serve nobody. Where
        everything that can go out does, so much is kept free in any case: a longer queue serves no more.

        Args:
            seconds: that it will take, by forecast.
            limit: that it may take.
            load: part of what can go out that does.
        """
        busy = min(1.0, max(0.0, load - _BUSY) / (1.0 - _BUSY))
        return seconds + self._error + min(max(self._beyond, limit * _PART * busy), limit * _PART)

    def late(self, seconds: float, limit: float, load: float, now: float) -> float | None:
        """What a request may take, if that is more than it may and nobody is to see whether it is so."""
        most = self.most(seconds, limit, load)
        if most <= limit:
            return None
        if not 0.0 <= now - self._seen <= self._trust:  # a clock that was put back makes everything old
            self._seen, self._asked = now, True
            self._trust = max(self._trust, _TRUST, min(_LONGEST, 2.0 * seconds))
            return None
        return most

    def ended(self, errors: Sequence[float], now: float) -> None:
        """Requests ended together that took so many seconds longer than forecast."""
        error, worst, trust = sum(errors) / len(errors), max(errors), 0.0
        if self._asked and error < self._error / 2:
            self._errors.clear()
            self._beyond = 0.0
        elif self._asked:
            trust = min(_LONGEST, 2.0 * self._trust)
        self._errors.append(error)
        self._error = sorted(self._errors)[len(self._errors) // 2]
        beyond = worst - self._error
        self._beyond = max(beyond, self._beyond - _FORGETS * (self._beyond - beyond))
        self._trust = max(trust, _TRUST)
        self._seen, self._asked = now, False

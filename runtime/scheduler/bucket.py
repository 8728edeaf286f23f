"""A token bucket: so many requests a second, so many at once."""

from __future__ import annotations

__all__ = ["TokenBucket"]

_ROUNDING = 1e-9
_TURN = 1.0


class TokenBucket:
    """Tokens of one tenant. Rate and burst come with each call, so that they can change while it runs.

    A clock that jumps forward fills the bucket to its burst at most; one that jumps back adds nothing, and
    time goes on from there.

    Attributes:
        full_at: seconds on the clock from which on it is as good as new, by what was last asked.
    """

    def __init__(self) -> None:
        self._tokens: float | None = None
        self._seen = 0.0
        self.full_at = 0.0

    def wait(self, now: float, rate: float, burst: int, before: int = 0) -> float:
        """Seconds until there is a token, when ``before`` others have been promised one. Takes none.

        Args:
            now: seconds on the clock.
            rate: tokens a second.
            burst: most tokens that are kept.
        """
        return _wait(self._refill(now, rate, burst) - before - 1, rate)

    def take(self, now: float, rate: float, burst: int) -> float:
        """Takes a token, or promises one that is still to come; seconds until it is there."""
        tokens = self._refill(now, rate, burst) - 1
        self._tokens = tokens
        self.full_at = self._seen + _wait(tokens - burst, rate)
        return _wait(tokens, rate)

    def put_back(self) -> None:
        """A token was not needed after all."""
        if self._tokens is not None:
            self._tokens += 1

    def _refill(self, now: float, rate: float, burst: int) -> float:
        before = float(burst) if self._tokens is None else self._tokens
        self._tokens = min(float(burst), before + max(0.0, now - self._seen) * rate)
        # Callers read the clock before they take their turn here; a second is no turn.
        self._seen = now if now < self._seen - _TURN else max(self._seen, now)
        return self._tokens


def _wait(tokens: float, rate: float) -> float:
    return 0.0 if tokens >= -_ROUNDING else -tokens / rate

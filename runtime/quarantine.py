"""Tenants are held off for a while from models that keep raising, so that they take no turns from others.

A circuit breaker (Nygard, "Release It!", 2007): after a run of failures it opens for a moment that doubles
with each further failure; the first request after that decides whether it closes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from torch_mux.errors import Quarantined

__all__ = ["Quarantine"]

_FIRST: Final = 0.1
_MOST: Final = 30.0
_KEPT: Final = 1024
_TURN: Final = 1.0  # clocks are read before locks are taken
#: A tenant and the class of a model.
Key = tuple[str, str]


@dataclass
class _Record:
    failures: int = 0
    until: float = float("-inf")
    seen: float = 0.0
    cause: str = ""

    def held(self, now: float) -> bool:
        """Whether it is held off; a clock that was put back ends that."""
        return self.seen - _TURN <= now < self.until


class Quarantine:
    """Failures in a row by tenant and model, of those that have any; safe from any thread.

    Args:
        limit: failures in a row from which on a tenant is held off; 0: never. Asked at each failure.

    Attributes:
        watching: whether anybody has failed lately; if not, nobody needs to ask.
    """

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._records: dict[Key, _Record] = {}
        self.watching = False

    def succeeded(self, key: Key) -> None:
        """A request of the tenant to the model ended well."""
        with self._lock:
            self._records.pop(key, None)
            self.watching = bool(self._records)

    def failed(self, key: Key, now: float, cause: BaseException | None) -> None:
        """A request of the tenant to the model raised while it ran."""
        with self._lock:
            if len(self._records) >= _KEPT:
                self._make_room(now)
            record = self._records.setdefault(key, _Record())
            self.watching = True
            record.failures += 1
            record.seen, record.cause = now, str(cause)
            limit = self._limit()
            over = record.failures - limit
            if limit and over >= 0:
                record.until = now + min(_MOST, _FIRST * 2.0 ** min(over, 32))

    def _make_room(self, now: float) -> None:
        """Forgets who failed long ago; of too many, first those who are not held off, the oldest first."""
        kept = {key: one for key, one in self._records.items() if now < one.seen + 2 * _MOST}
        if len(kept) >= _KEPT:
            ordered = sorted(kept.items(), key=lambda item: (item[1].held(now), item[1].seen))
            kept = dict(ordered[len(kept) - _KEPT // 2 :])
        self._records = kept

    def held(self, key: Key, now: float) -> tuple[float, int, str] | None:
        """(seconds left, failures in a row, the last cause) of who is held off, or None."""
        with self._lock:
            record = self._records.get(key)
            if record is None or not record.held(now):
                return None
            return record.until - now, record.failures, record.cause

    def check(self, key: Key, now: float) -> None:
        """Raises :class:`Quarantined` for who is held off."""
        held = self.held(key, now)
        if held is not None:
            wait, failures, cause = held
            tenant, model = key
            raise Quarantined(tenant=tenant, model=model, wait=wait, failures=failures, cause=cause)

    def tenants(self, now: float) -> dict[Key, float]:
        """Seconds left of everybody who is held off."""
        with self._lock:
            return {key: one.until - now for key, one in self._records.items() if one.held(now)}

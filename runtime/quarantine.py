"""Tenants whose models keep raising are held off for a while, so that they do not take turns from others.

A circuit breaker (Nygard, "Release It!", 2007): after a run of failures it opens for a moment that doubles
with each further failure; the first request after that decides whether it closes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

__all__ = ["Quarantine"]

_FIRST: Final = 0.1
_MOST: Final = 30.0


@dataclass
class _Record:
    failures: int = 0
    until: float = float("-inf")
    cause: str = ""


class Quarantine:
    """Failures in a row by tenant, of those that have any; safe from any thread.

    Args:
        limit: failures in a row from which on a tenant is held off; 0: never. Asked at each failure.

    Attributes:
        watching: whether any tenant has failed lately; if not, nobody needs to ask.
    """

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit = limit
        self.clear()

    def clear(self) -> None:
        """Forgets everything; also in a forked child, where the lock may be held for ever."""
        self._lock = threading.Lock()
        self._records: dict[str, _Record] = {}
        self.watching = False

    def succeeded(self, tenant: str) -> None:
        """A request of the tenant ended well."""
        with self._lock:
            self._records.pop(tenant, None)
            self.watching = bool(self._records)

    def failed(self, tenant: str, now: float, cause: BaseException | None) -> None:
        """A request of the tenant raised while it ran."""
        with self._lock:
            record = self._records.setdefault(tenant, _Record())
            self.watching = True
            record.failures += 1
            record.cause = str(cause)
            limit = self._limit()
            over = record.failures - limit
            if limit and over >= 0:
                record.until = now + min(_MOST, _FIRST * 2.0 ** min(over, 32))

    def held(self, tenant: str, now: float) -> tuple[float, int, str] | None:
        """(seconds left, failures in a row, the last cause) of a tenant that is held off, or None."""
        with self._lock:
            record = self._records.get(tenant)
            if record is None or now >= record.until:
                return None
            return record.until - now, record.failures, record.cause

    def tenants(self, now: float) -> dict[str, float]:
        """Seconds left of everybody who is held off."""
        with self._lock:
            return {name: one.until - now for name, one in self._records.items() if now < one.until}

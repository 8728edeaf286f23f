"""The token buckets of all tenants."""

from __future__ import annotations

import threading

from torch_mux.runtime.scheduler.bucket import TokenBucket
from torch_mux.types import Quota

__all__ = ["Rates", "burst_of"]


class Rates:
    """Tokens by tenant; safe from any thread. Every quota that is asked about has a rate."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buckets: dict[str, TokenBucket] = {}

    def wait(self, quota: Quota, now: float, before: int = 0) -> float:
        """Seconds until there is a token, when ``before`` others have been promised one. Takes none."""
        with self._lock:
            return self._bucket(quota).wait(now, quota.rate or 0.0, burst_of(quota), before)

    def take(self, quota: Quota, now: float) -> None:
        """Takes a token, or promises one that is still to come."""
        with self._lock:
            self._bucket(quota).take(now, quota.rate or 0.0, burst_of(quota))

    def put_back(self, quota: Quota) -> None:
        """A token was not needed after all."""
        with self._lock:
            self._bucket(quota).put_back()

    def _bucket(self, quota: Quota) -> TokenBucket:
        return self._buckets.setdefault(quota.tenant, TokenBucket())


def burst_of(quota: Quota) -> int:
    """Requests that may come at once: those of one second where the quota does not say."""
    if quota.burst is not None:
        return quota.burst
    return max(1, int(quota.rate or 0.0))

"""The token buckets of all tenants."""

from __future__ import annotations

import threading

from torch_mux.runtime.scheduler.bucket import TokenBucket
from torch_mux.types import Quota

__all__ = ["Rates", "burst_of"]


_KEPT = 1024


class Rates:
    """Tokens by tenant; safe from any thread. Every quota that is asked about has a rate.

    Buckets that are full are forgotten once there are many: a new one is no different.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buckets: dict[str, TokenBucket] = {}
        self._prune_at = _KEPT

    def wait(self, quota: Quota, now: float, before: int = 0) -> float:
        """Seconds until there is a token, when ``before`` others have been promised one. Takes none."""
        with self._lock:
            return self._bucket(quota, now).wait(now, quota.rate or 0.0, burst_of(quota), before)

    def take(self, quota: Quota, now: float) -> None:
        """Takes a token, or promises one that is still to come."""
        with self._lock:
            self._bucket(quota, now).take(now, quota.rate or 0.0, burst_of(quota))

    def put_back(self, quota: Quota) -> None:
        """A token was not needed after all."""
        with self._lock:
            bucket = self._buckets.get(quota.tenant)
            if bucket is not None:  # else it is full
                bucket.put_back()

    def _bucket(self, quota: Quota, now: float) -> TokenBucket:
        bucket = self._buckets.get(quota.tenant)
        if bucket is None:
            if len(self._buckets) >= self._prune_at:
                self._buckets = {name: one for name, one in self._buckets.items() if one.full_at > now}
                self._prune_at = max(_KEPT, 2 * len(self._buckets))
            bucket = self._buckets[quota.tenant] = TokenBucket()
        return bucket


def burst_of(quota: Quota) -> int:
    """Requests that may come at once: those of one second where the quota does not say."""
    if quota.burst is not None:
        return quota.burst
    return max(1, int(quota.rate or 0.0))

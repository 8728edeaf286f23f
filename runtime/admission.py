"""Who may queue a request: pending limits, rates, deadlines and the sum of reserves, by tenant."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from torch_mux.errors import DeadlineUnattainable, InvalidQuota, Overloaded, RateExceeded
from torch_mux.runtime.accounting import Accounting
from torch_mux.runtime.scheduler.bucket import TokenBucket
from torch_mux.types import Quota

__all__ = ["Admission"]

_ROUNDING = 1e-9
#: Of (index, how many of its tenant are before it in the same call): seconds on the clock, or None.
Outlook = Callable[[int, int], "float | None"]


class Admission:
    """Checks requests before they cost anything; safe from any thread.

    Quotas without limits are only counted. A tenant's reserve is the one of its last request; it stands until
    a request brings another one.

    Attributes:
        quarantine: who is held off from which model.
    """

    def __init__(self, accounting: Accounting) -> None:
        self._accounting = accounting
        self.quarantine = accounting.quarantine
        self.clear()

    def clear(self) -> None:
        """Forgets everything; also in a forked child, where the lock may be held for ever."""
        self._lock = threading.Lock()
        self._buckets: dict[str, TokenBucket] = {}
        self._reserves: dict[str, float] = {}

    def admit(self, quotas: Sequence[Quota], now: float, outlook: Outlook) -> Sequence[float] | None:
        """Accepts requests under these quotas, all or none.

        Args:
            now: seconds on the clock.
            outlook: when the request of an index would have ended, behind so many of its tenant; None where
                that cannot be told.

        Returns:
            For how many seconds each is held back; None where none is.

        Raises:
            Overloaded, RateExceeded, DeadlineUnattainable: a limit of one of the quotas says no.
            InvalidQuota: the reserves of all tenants add up to more than 1.
        """
        last: Quota | None = None
        for quota in quotas:
            if quota is not last:
                last = quota
                if quota.limited or quota.tenant in self._reserves:
                    return self._limited(quotas, now, outlook)
        self._accounting.accepted(quotas)
        return None

    def _limited(self, quotas: Sequence[Quota], now: float, outlook: Outlook) -> Sequence[float] | None:
        with self._lock:
            reserves = self._reserved(quotas)
            self._check_pending(quotas)
            waits = self._waits(quotas, now)
            self._check_deadlines(quotas, waits, now, outlook)
            self._reserves = reserves
            for quota in quotas:
                if quota.rate is not None:
                    self._bucket(quota).take(now, quota.rate, burst_of(quota))
            self._accounting.accepted(quotas)
        return waits if any(waits) else None

    def _reserved(self, quotas: Sequence[Quota]) -> dict[str, float]:
        if all(self._reserves.get(quota.tenant, 0.0) == quota.reserve for quota in quotas):
            return self._reserves
        reserves = dict(self._reserves)
        for quota in quotas:
            if quota.reserve:
                reserves[quota.tenant] = quota.reserve
            else:
                reserves.pop(quota.tenant, None)
        total = sum(reserves.values())
        if total > 1 + _ROUNDING:
            names = ", ".join(f"{name!r} {part:g}" for name, part in sorted(reserves.items()))
            asked = next(quota for quota in quotas if quota.reserve)
            detail = f"the reserves of all tenants add up to {total:g}, above 1 ({names}): lower one of them"
            raise InvalidQuota(field="reserve", value=asked.reserve, detail=detail)
        return reserves

    def _check_pending(self, quotas: Sequence[Quota]) -> None:
        asked: Counter[str] = Counter()
        for quota in quotas:
            asked[quota.tenant] += 1
            if quota.max_pending is not None:
                pending = self._accounting.pending(quota.tenant)
                if pending + asked[quota.tenant] > quota.max_pending:
                    raise Overloaded(tenant=quota.tenant, pending=pending, limit=quota.max_pending)

    def _waits(self, quotas: Sequence[Quota], now: float) -> list[float]:
        waits: list[float] = []
        before: Counter[str] = Counter()
        for quota in quotas:
            wait = 0.0
            if quota.rate is not None:
                burst = burst_of(quota)
                wait = self._bucket(quota).wait(now, quota.rate, burst, before[quota.tenant])
                before[quota.tenant] += 1
                if wait > 0.0 and quota.excess == "refuse":
                    raise RateExceeded(tenant=quota.tenant, rate=quota.rate, burst=burst, wait=wait)
            waits.append(wait)
        return waits

    def _check_deadlines(
        self, quotas: Sequence[Quota], waits: Sequence[float], now: float, outlook: Outlook
    ) -> None:
        before: Counter[str] = Counter()
        for index, (quota, wait) in enumerate(zip(quotas, waits, strict=True)):
            if quota.deadline is None:
                continue
            if wait >= quota.deadline:
                detail = f"its rate of {quota.rate:g} a second holds it for {wait:.3g} s"
                raise DeadlineUnattainable(tenant=quota.tenant, deadline=quota.deadline, detail=detail)
            end = outlook(index, before[quota.tenant])
            before[quota.tenant] += 1
            if end is not None and end + wait > now + quota.deadline:
                detail = f"what is under way, its tenant's other requests and itself take {end - now:.3g} s"
                raise DeadlineUnattainable(tenant=quota.tenant, deadline=quota.deadline, detail=detail)

    def _bucket(self, quota: Quota) -> TokenBucket:
        return self._buckets.setdefault(quota.tenant, TokenBucket())

    def withdraw(self, quotas: Iterable[Quota]) -> None:
        """Takes back :meth:`admit` for requests that were not queued after all."""
        for quota in quotas:
            self._accounting.withdrawn(quota)
            if quota.rate is not None:
                with self._lock:
                    self._bucket(quota).put_back()


def burst_of(quota: Quota) -> int:
    """Requests that may come at once: those of one second where the quota does not say."""
    if quota.burst is not None:
        return quota.burst
    return max(1, int(quota.rate or 0.0))

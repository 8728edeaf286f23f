"""Who may queue a request: pending limits, rates, deadlines and the sum of reserves, by tenant."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from torch_mux.errors import DeadlineUnattainable, InvalidQuota, Overloaded, RateExceeded
from torch_mux.runtime.accounting import Accounting
from torch_mux.runtime.rates import burst_of
from torch_mux.types import Quota

__all__ = ["Admission", "Refusals"]

_ROUNDING = 1e-9
#: Of (index, seconds): the seconds that a request would take, if that may be more than those; or None.
Late = Callable[[int, float], "float | None"]
#: By index, why requests were not accepted.
Refusals = dict[int, DeadlineUnattainable]


class Admission:
    """Checks requests before they cost anything; safe from any thread.

    Quotas without limits are only counted. A tenant's reserve is the one of its last request, or what an
    update of its quota has lowered it to. It stands as long as the tenant has requests under way or a model:
    then the next tenant who needs the room gets it.

    Args:
        owns: whether a tenant has used a model that is still there.

    Attributes:
        quarantine: who is held off from which model.
    """

    def __init__(self, accounting: Accounting, owns: Callable[[str], bool] = lambda tenant: True) -> None:
        self._accounting = accounting
        self._rates = accounting.rates
        self._owns = owns
        self.quarantine = accounting.quarantine
        self._lock = threading.Lock()
        self._reserves: dict[str, float] = {}

    def lower(self, tenant: str, reserve: float) -> None:
        """A tenant's quota grants it no more than ``reserve`` from now on."""
        with self._lock:
            if reserve < self._reserves.get(tenant, 0.0):
                self._reserves = self._reserves | {tenant: reserve}

    def admit(
        self, quotas: Sequence[Quota], now: float, late: Late, refused: Refusals | None = None
    ) -> Sequence[float] | None:
        """Accepts requests under these quotas, all or none.

        Args:
            now: seconds on the clock.
            late: asked for the requests with a deadline, in order; see :class:`Outlook`.
            refused: where it is given, those that could not meet their deadline are noted in it, and all
                others accepted.

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
                    return self._limited(quotas, now, late, refused)
        self._accounting.accepted(quotas)
        return None

    def _limited(
        self, quotas: Sequence[Quota], now: float, late: Late, refused: Refusals | None
    ) -> Sequence[float] | None:
        with self._lock:
            reserves = self._reserved(quotas)
            self._check_pending(quotas)
            waits = self._waits(quotas, now)
            self._check_deadlines(quotas, waits, late, refused)
            self._reserves = reserves
            if refused:
                quotas = [quota for index, quota in enumerate(quotas) if index not in refused]
            for quota in quotas:
                if quota.rate is not None:
                    self._rates.take(quota, now)
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
        if sum(reserves.values()) > 1 + _ROUNDING:
            asking = {quota.tenant for quota in quotas}
            reserves = {
                tenant: reserve
                for tenant, reserve in reserves.items()
                if tenant in asking or self._accounting.pending(tenant) or self._owns(tenant)
            }
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
                wait = self._rates.wait(quota, now, before[quota.tenant])
                before[quota.tenant] += 1
                if wait > 0.0 and quota.excess == "refuse":
                    burst = burst_of(quota)
                    raise RateExceeded(tenant=quota.tenant, rate=quota.rate, burst=burst, wait=wait)
            waits.append(wait)
        return waits

    def _check_deadlines(
        self, quotas: Sequence[Quota], waits: Sequence[float], late: Late, refused: Refusals | None
    ) -> None:
        for index, (quota, wait) in enumerate(zip(quotas, waits, strict=True)):
            if quota.deadline is None:
                continue
            if wait >= quota.deadline:
                detail = f"its rate of {quota.rate:g} a second holds it for {wait:.3g} s"
            else:
                seconds = late(index, quota.deadline - wait)
                if seconds is None:
                    continue
                detail = f"what goes before it and itself may take {seconds:.3g} s"
            if refused is None:
                raise DeadlineUnattainable(tenant=quota.tenant, deadline=quota.deadline, detail=detail)
            refused[index] = DeadlineUnattainable(tenant=quota.tenant, deadline=quota.deadline, detail=detail)

    def refuse(self, quotas: Iterable[Quota]) -> None:
        """Counts requests that were not accepted."""
        for quota in quotas:
            self._accounting.refused(quota)

    def withdraw(self, quotas: Iterable[Quota]) -> None:
        """Takes back :meth:`admit` for requests that were not queued after all."""
        for quota in quotas:
            self._accounting.withdrawn(quota)
            if quota.rate is not None:
                self._rates.put_back(quota)

"""Which tenants with a reserve are at work, or will probably be before long."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch_mux.runtime.scheduler.base import Queue, Ticket

__all__ = ["Reserves"]

#: A reserve is lent while its tenant comes during the next bundle of others with less than this probability.
_RISK = 0.1
_RATE = 0.25
_GROWTH = 4.0
#: Seconds after which a tenant that sent nothing is no longer thought of.
_FORGOTTEN = 60.0


@dataclass
class _Holder:
    """A tenant: its reserve, its last arrival, the running mean of the gaps between them."""

    reserve: float
    latest: float
    gap: float = 0.0
    under_way: int = 0

    def arrived(self, moment: float) -> None:
        """A request came. A pause counts as a gap of limited length, so that it is soon forgotten."""
        gap = max(0.0, moment - self.latest)
        self.latest = moment
        self.gap = self.gap + _RATE * (min(gap, _GROWTH * self.gap) - self.gap) if self.gap else gap

    def expected(self, now: float, seconds: float) -> bool:
        """Whether a request will probably come within ``seconds``: about ``seconds`` over the gap.

        The longer the tenant is silent the longer its gap is taken to be. A clock that went back counts as
        silence too.
        """
        return self.under_way > 0 or seconds > _RISK * max(self.gap, abs(now - self.latest))


class Reserves:
    """The tenants with a reserve that sent something within the last minute."""

    def __init__(self) -> None:
        self._holders: dict[str, _Holder] = {}

    def __bool__(self) -> bool:
        return bool(self._holders)

    def active(self, pending: Iterable[Queue], now: float, seconds: float) -> float:
        """Sum of the reserves in use: of tenants with something pending, under way, or soon to come.

        Args:
            pending: the queues of tenants with a reserve.
            seconds: what a bundle of the others will take.
        """
        found = {name: one.reserve for name, one in self._holders.items() if one.expected(now, seconds)}
        found.update(_asked(pending))
        return min(1.0, sum(found.values()))

    def known(self, pending: Iterable[Queue]) -> float:
        """Sum of all reserves."""
        found = {name: one.reserve for name, one in self._holders.items()}
        found.update(_asked(pending))
        return min(1.0, sum(found.values()))

    def issued(self, requests: Sequence[Ticket], now: float) -> None:
        """A bundle of such tenants went out."""
        for request in requests:
            quota = request.quota
            holder = self._holders.get(quota.tenant)
            if holder is None:
                holder = self._holders[quota.tenant] = _Holder(quota.reserve, request.arrival)
            else:
                holder.reserve = quota.reserve
                holder.arrived(request.arrival)
            holder.under_way += 1
        self.forget(now)

    def completed(self, requests: Sequence[Ticket]) -> None:
        """A bundle that :meth:`issued` was told of ended."""
        for request in requests:
            holder = self._holders.get(request.quota.tenant)
            if holder is not None:
                holder.under_way = max(0, holder.under_way - 1)

    def forget(self, now: float) -> None:
        """Drops the tenants that sent nothing for a minute."""
        gone = [
            name
            for name, one in self._holders.items()
            if not one.under_way and abs(now - one.latest) > _FORGOTTEN
        ]
        for name in gone:
            del self._holders[name]


def _asked(pending: Iterable[Queue]) -> dict[str, float]:
    """The largest reserve that each tenant's oldest pending requests carry."""
    found: dict[str, float] = {}
    for queue in pending:
        for (_, tenant), tickets in queue.flows().items():
            found[tenant] = max(found.get(tenant, 0.0), next(iter(tickets)).quota.reserve)
    return found

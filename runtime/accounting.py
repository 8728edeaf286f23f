"""What each tenant got: outcomes, latencies, device seconds."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch_mux.runtime.memory import MemoryLedger
from torch_mux.runtime.request import Request, RequestState
from torch_mux.runtime.shares import PICOSECONDS, divided
from torch_mux.types import Quota

__all__ = ["Accounting", "StatsSnapshot", "TenantStats"]

_WINDOW = 2048
_DONE, _CANCELLED, _EXPIRED = RequestState.DONE, RequestState.CANCELLED, RequestState.EXPIRED


@dataclass(frozen=True)
class TenantStats:
    """What one tenant got so far.

    Attributes:
        tenant: its name.
        accepted: requests queued; always ok + late + expired + cancelled + errors + pending.
        ok, errors, cancelled: requests by outcome.
        pending: requests queued or under way.
        p50, p99: latency quantiles in seconds from submission to the end on the device, over the last 2,048
            requests that ended well; None before the first.
        device_seconds: device time, that of a bundle divided over its slots by their work. The sum over
            tenants is that of the bundles to the picosecond.
        queue_seconds: time its requests spent queued, in sum.
        held: bytes that it holds now, see :class:`torch_mux.runtime.memory.MemoryLedger`.
        late: requests that were served, but after their ``slo`` or ``deadline``.
        expired: requests that were dropped because their ``deadline`` had passed.
        refused: requests that were not accepted: a limit of their quota said no.
        coalesced_share: part of its requests to coalesced plans that shared their bundle, None before the
            first.
    """

    tenant: str
    accepted: int
    ok: int
    errors: int
    cancelled: int
    pending: int
    p50: float | None
    p99: float | None
    device_seconds: float
    queue_seconds: float
    coalesced_share: float | None
    held: int = 0
    late: int = 0
    expired: int = 0
    refused: int = 0


@dataclass(frozen=True)
class StatsSnapshot:
    """Counters of the whole runtime at one moment.

    Attributes:
        tenants: by tenant name.
        bundles: bundles that the devices finished.
        requests: requests they carried.
        device_seconds: device time of those bundles.
        sizes: bundles by number of slots.
    """

    tenants: Mapping[str, TenantStats]
    bundles: int
    requests: int
    device_seconds: float
    sizes: Mapping[int, int]


class _Tenant:
    __slots__ = (
        "accepted",
        "cancelled",
        "coalescible",
        "device_time",
        "errors",
        "expired",
        "late",
        "latencies",
        "ok",
        "queue_seconds",
        "refused",
        "shared",
    )

    def __init__(self) -> None:
        self.accepted = self.ok = self.late = 0
        self.errors = self.cancelled = self.expired = self.refused = 0
        self.coalescible = self.shared = 0
        self.device_time = 0  # picoseconds
        self.queue_seconds = 0.0
        self.latencies: deque[float] = deque(maxlen=_WINDOW)

    def not_served(self, state: RequestState) -> None:
        if state is _CANCELLED:
            self.cancelled += 1
        elif state is _EXPIRED:
            self.expired += 1
        else:
            self.errors += 1

    def ran(self, time: int, coalescible: int, shared: int, queued: float) -> None:
        self.device_time += time
        self.coalescible += coalescible
        self.shared += shared
        self.queue_seconds += queued

    @property
    def pending(self) -> int:
        return self.accepted - self.ok - self.late - self.errors - self.cancelled - self.expired

    def snapshot(self, name: str, held: int) -> TenantStats:
        ordered = sorted(self.latencies)
        return TenantStats(
            tenant=name,
            accepted=self.accepted,
            ok=self.ok,
            errors=self.errors,
            cancelled=self.cancelled,
            pending=self.pending,
            p50=_quantile(ordered, 0.5),
            p99=_quantile(ordered, 0.99),
            device_seconds=self.device_time / PICOSECONDS,
            queue_seconds=self.queue_seconds,
            coalesced_share=self.shared / self.coalescible if self.coalescible else None,
            held=held,
            late=self.late,
            expired=self.expired,
            refused=self.refused,
        )


def _quantile(ordered: Sequence[float], q: float) -> float | None:
    """The nearest-rank quantile of sorted values."""
    if not ordered:
        return None
    return ordered[min(len(ordered) - 1, max(0, -int(-q * len(ordered) // 1) - 1))]


class Accounting:
    """Counters a tenant, of bounded size; safe from any thread.

    Attributes:
        memory: what tenants hold; it is told of every end.
    """

    def __init__(self, memory: MemoryLedger | None = None) -> None:
        self.memory = memory
        self._lock = threading.Lock()
        self._tenants: dict[str, _Tenant] = {}
        self._bundles = 0
        self._requests = 0
        self._device_time = 0
        self._sizes: Counter[int] = Counter()

    def _tenant(self, name: str) -> _Tenant:
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = _Tenant()
        return tenant

    def accepted(self, quotas: Sequence[Quota]) -> None:
        """Requests under these quotas are about to be queued."""
        last: Quota | None = None
        with self._lock:
            for quota in quotas:
                if quota is not last:
                    last, tenant = quota, self._tenant(quota.tenant)
                tenant.accepted += 1

    def withdrawn(self, quota: Quota) -> None:
        """A request that was accepted was not queued after all."""
        with self._lock:
            self._tenant(quota.tenant).accepted -= 1

    def refused(self, quota: Quota) -> None:
        """A request was not accepted."""
        with self._lock:
            self._tenant(quota.tenant).refused += 1

    def pending(self, tenant: str) -> int:
        """Requests of a tenant that are queued or under way."""
        with self._lock:
            found = self._tenants.get(tenant)
            return 0 if found is None else found.pending

    def ended(self, requests: Sequence[Request], now: float) -> None:
        """Requests ended at ``now``; their state says how."""
        last: Quota | None = None
        with self._lock:
            for request in requests:
                quota = request.quota
                if quota is not last:
                    last, tenant = quota, self._tenant(quota.tenant)
                if request.state is _DONE:
                    arrival = request.arrival
                    tenant.latencies.append(now - arrival if now > arrival else 0.0)
                    if request.due < now:
                        tenant.late += 1
                    else:
                        tenant.ok += 1
                else:
                    tenant.not_served(request.state)
        if self.memory is not None:
            self.memory.release(requests)

    def ran(self, requests: Sequence[Request], seconds: float, coalesced: bool) -> None:
        """A bundle of these requests took ``seconds`` of the device."""
        slots = len(requests)
        time = round(seconds * PICOSECONDS)
        coalescible, shared = int(coalesced), int(coalesced and slots > 1)
        last: Quota | None = None
        queued = [one.started - one.arrival if one.started > one.arrival else 0.0 for one in requests]
        alone = len({id(request.quota) for request in requests}) == 1
        parts = () if alone else divided(time, [request.work for request in requests])
        with self._lock:
            self._bundles += 1
            self._requests += slots
            self._device_time += time
            self._sizes[slots] += 1
            if alone:
                tenant = self._tenant(requests[0].quota.tenant)
                tenant.ran(time, slots * coalescible, slots * shared, sum(queued))
                return
            for request, part, wait in zip(requests, parts, queued, strict=True):
                quota = request.quota
                if quota is not last:
                    last, tenant = quota, self._tenant(quota.tenant)
                tenant.ran(part, coalescible, shared, wait)

    def snapshot(self) -> StatsSnapshot:
        """Everything counted so far, as frozen data."""
        memory = self.memory
        with self._lock:
            held = {name: 0 if memory is None else memory.held(name) for name in self._tenants}
            return StatsSnapshot(
                tenants={name: tenant.snapshot(name, held[name]) for name, tenant in self._tenants.items()},
                bundles=self._bundles,
                requests=self._requests,
                device_seconds=self._device_time / PICOSECONDS,
                sizes=dict(sorted(self._sizes.items())),
            )

    def abandon_after_fork(self) -> None:
        """In a forked child, where the lock may be held for ever."""
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._tenants.clear()
            self._sizes.clear()
            self._bundles = self._requests = self._device_time = 0

"""What each tenant got: outcomes, latencies, device seconds."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch_mux.errors import ExecutionFailed
from torch_mux.runtime.memory import MemoryLedger
from torch_mux.runtime.quarantine import Quarantine
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
        weight: of the quota that its last accepted request ran under.
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
    weight: float = 1.0


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
        "weight",
    )

    def __init__(self) -> None:
        self.accepted = self.ok = self.late = 0
        self.errors = self.cancelled = self.expired = self.refused = 0
        self.coalescible = self.shared = 0
        self.device_time = 0  # picoseconds
        self.queue_seconds = 0.0
        self.weight = 1.0
        self.latencies: deque[float] = deque(maxlen=_WINDOW)

    def ended(self, requests: Sequence[Request], now: float) -> bool:
        """Counts; returns whether one of them failed."""
        arrivals = [request.arrival for request in requests if request.state is _DONE]
        late = sum([request.due < now for request in requests if request.state is _DONE])
        self.late += late
        self.ok += len(arrivals) - late
        self.latencies.extend([now - arrival if now > arrival else 0.0 for arrival in arrivals])
        failed = 0
        if len(arrivals) < len(requests):
            cancelled = sum(request.state is _CANCELLED for request in requests)
            expired = sum(request.state is _EXPIRED for request in requests)
            self.cancelled += cancelled
            self.expired += expired
            failed = len(requests) - len(arrivals) - cancelled - expired
            self.errors += failed
        return failed > 0

    @property
    def pending(self) -> int:
        return self.accepted - self.ok - self.late - self.errors - self.cancelled - self.expired

    def ran(self, requests: Sequence[Request], time: int, coalescible: bool, shared: bool) -> None:
        count = len(requests)
        self.device_time += time
        self.queue_seconds += sum(
            [one.started - one.arrival if one.started > one.arrival else 0.0 for one in requests]
        )
        if coalescible:
            self.coalescible += count
            self.shared += count if shared else 0

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
            weight=self.weight,
        )


def _quantile(ordered: Sequence[float], q: float) -> float | None:
    """The nearest-rank quantile of sorted values."""
    if not ordered:
        return None
    return ordered[min(len(ordered) - 1, max(0, -int(-q * len(ordered) // 1) - 1))]


class Accounting:
    """Counters a tenant, of bounded size; safe from any thread.

    Args:
        memory: what tenants hold; it is told of every end.
        quarantine: how many failures in a row are too many; see :class:`Quarantine`.
    """

    def __init__(self, memory: MemoryLedger | None = None, quarantine: Callable[[], int] = lambda: 0) -> None:
        self.memory = memory
        self.quarantine = Quarantine(quarantine)
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

    def _by_tenant(self, requests: Sequence[Request]) -> list[tuple[_Tenant, Sequence[Request]]]:
        """Requests with the counters of their tenant: all together where they run under one quota."""
        first = requests[0].quota if requests else None
        for request in requests:
            if request.quota is not first:
                return [(self._tenant(one.quota.tenant), (one,)) for one in requests]
        return [(self._tenant(first.tenant), requests)] if first is not None else []

    def accepted(self, quotas: Sequence[Quota]) -> None:
        """Requests under these quotas are about to be queued."""
        last: Quota | None = None
        with self._lock:
            for quota in quotas:
                if quota is not last:
                    last, tenant = quota, self._tenant(quota.tenant)
                    tenant.weight = quota.weight
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
        with self._lock:
            failed = False
            for tenant, group in self._by_tenant(requests):
                failed = tenant.ended(group, now) or failed
        if failed or self.quarantine.watching:
            self._watch(requests, now)
        if self.memory is not None:
            self.memory.release(requests)

    def _watch(self, requests: Sequence[Request], now: float) -> None:
        for request in requests:
            if request.state is _DONE:
                self.quarantine.succeeded(request.quota.tenant)
            elif isinstance(request.error, ExecutionFailed):
                self.quarantine.failed(request.quota.tenant, now, request.error)

    def ran(self, requests: Sequence[Request], seconds: float, coalesced: bool) -> None:
        """A bundle of these requests took ``seconds`` of the device."""
        slots = len(requests)
        time = round(seconds * PICOSECONDS)
        with self._lock:
            self._bundles += 1
            self._requests += slots
            self._device_time += time
            self._sizes[slots] += 1
            groups = self._by_tenant(requests)
            if len(groups) == 1:
                groups[0][0].ran(requests, time, coalesced, slots > 1)
                return
            times = divided(time, [request.work for request in requests])
            for (tenant, group), part in zip(groups, times, strict=True):
                tenant.ran(group, part, coalesced, slots > 1)

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
        self.quarantine.clear()

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self.quarantine.clear()
            self._tenants.clear()
            self._sizes.clear()
            self._bundles = self._requests = self._device_time = 0

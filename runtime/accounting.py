"""What each tenant got: outcomes, latencies, device seconds."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch_mux.runtime.memory import MemoryLedger
from torch_mux.runtime.request import Request, RequestState
from torch_mux.runtime.shares import PICOSECONDS, divided

__all__ = ["Accounting", "StatsSnapshot", "TenantStats"]

_WINDOW = 2048
_DONE, _CANCELLED = RequestState.DONE, RequestState.CANCELLED


@dataclass(frozen=True)
class TenantStats:
    """What one tenant got so far.

    Attributes:
        tenant: its name.
        accepted: requests submitted; the sum of the four outcomes and of what is still pending.
        ok, errors, cancelled: requests by outcome.
        pending: requests queued or under way.
        p50, p99: latency quantiles in seconds from submission to the end on the device, over the last 2,048
            requests that ended well; None before the first.
        device_seconds: device time, that of a bundle divided over its slots by their work. The sum over
            tenants is that of the bundles to the picosecond.
        queue_seconds: time its requests spent queued, in sum.
        held: bytes that it holds now, see :class:`torch_mux.runtime.memory.MemoryLedger`.
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
        "latencies",
        "ok",
        "queue_seconds",
        "shared",
    )

    def __init__(self) -> None:
        self.accepted = self.ok = self.errors = self.cancelled = 0
        self.coalescible = self.shared = 0
        self.device_time = 0  # picoseconds
        self.queue_seconds = 0.0
        self.latencies: deque[float] = deque(maxlen=_WINDOW)

    def ended(self, requests: Sequence[Request], now: float) -> None:
        arrivals = [request.arrival for request in requests if request.state is _DONE]
        self.ok += len(arrivals)
        self.latencies.extend([now - arrival if now > arrival else 0.0 for arrival in arrivals])
        if len(arrivals) < len(requests):
            cancelled = sum(request.state is _CANCELLED for request in requests)
            self.cancelled += cancelled
            self.errors += len(requests) - len(arrivals) - cancelled

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
            pending=self.accepted - self.ok - self.errors - self.cancelled,
            p50=_quantile(ordered, 0.5),
            p99=_quantile(ordered, 0.99),
            device_seconds=self.device_time / PICOSECONDS,
            queue_seconds=self.queue_seconds,
            coalesced_share=self.shared / self.coalescible if self.coalescible else None,
            held=held,
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

    def _by_tenant(self, requests: Sequence[Request]) -> list[tuple[_Tenant, Sequence[Request]]]:
        """Requests with the counters of their tenant: all together where they run under one quota."""
        first = requests[0].quota if requests else None
        for request in requests:
            if request.quota is not first:
                return [(self._tenant(one.quota.tenant), (one,)) for one in requests]
        return [(self._tenant(first.tenant), requests)] if first is not None else []

    def accepted(self, requests: Sequence[Request]) -> None:
        """Requests were queued."""
        with self._lock:
            for tenant, group in self._by_tenant(requests):
                tenant.accepted += len(group)

    def ended(self, requests: Sequence[Request], now: float) -> None:
        """Requests ended at ``now``; their state says how."""
        with self._lock:
            for tenant, group in self._by_tenant(requests):
                tenant.ended(group, now)
        if self.memory is not None:
            self.memory.release(requests)

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

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._tenants.clear()
            self._sizes.clear()
            self._bundles = self._requests = self._device_time = 0

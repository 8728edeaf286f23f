"""What each tenant got: outcomes, latencies, device seconds."""

from __future__ import annotations

import threading
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch_mux.runtime.memory import MemoryLedger
from torch_mux.runtime.request import Request, RequestState

__all__ = ["Accounting", "StatsSnapshot", "TenantStats"]

_WINDOW = 2048


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
        device_seconds: device time, that of a bundle divided evenly over its slots.
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
        "device_seconds",
        "errors",
        "latencies",
        "next",
        "ok",
        "queue_seconds",
        "shared",
    )

    def __init__(self) -> None:
        self.accepted = self.ok = self.errors = self.cancelled = 0
        self.coalescible = self.shared = 0
        self.device_seconds = self.queue_seconds = 0.0
        self.latencies = array("d")
        self.next = 0

    def latency(self, seconds: float) -> None:
        if len(self.latencies) < _WINDOW:
            self.latencies.append(seconds)
        else:
            self.latencies[self.next] = seconds
            self.next = (self.next + 1) % _WINDOW

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
            device_seconds=self.device_seconds,
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
        self._seconds = 0.0
        self._sizes: Counter[int] = Counter()

    def _tenant(self, name: str) -> _Tenant:
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = _Tenant()
        return tenant

    def accepted(self, requests: Sequence[Request]) -> None:
        """Requests were queued."""
        with self._lock:
            for request in requests:
                self._tenant(request.quota.tenant).accepted += 1

    def ended(self, requests: Sequence[Request], now: float) -> None:
        """Requests ended at ``now``; their state says how."""
        with self._lock:
            for request in requests:
                tenant = self._tenant(request.quota.tenant)
                if request.state is RequestState.DONE:
                    tenant.ok += 1
                    tenant.latency(max(0.0, now - request.arrival))
                elif request.state is RequestState.CANCELLED:
                    tenant.cancelled += 1
                else:
                    tenant.errors += 1
        if self.memory is not None:
            self.memory.release(requests)

    def ran(self, requests: Sequence[Request], seconds: float, coalesced: bool) -> None:
        """A bundle of these requests took ``seconds`` of the device."""
        slots = len(requests)
        each = seconds / slots
        with self._lock:
            self._bundles += 1
            self._requests += slots
            self._seconds += seconds
            self._sizes[slots] += 1
            for request in requests:
                tenant = self._tenant(request.quota.tenant)
                tenant.device_seconds += each
                tenant.queue_seconds += max(0.0, request.started - request.arrival)
                if coalesced:
                    tenant.coalescible += 1
                    tenant.shared += slots > 1

    def snapshot(self) -> StatsSnapshot:
        """Everything counted so far, as frozen data."""
        memory = self.memory
        with self._lock:
            held = {name: 0 if memory is None else memory.held(name) for name in self._tenants}
            return StatsSnapshot(
                tenants={name: tenant.snapshot(name, held[name]) for name, tenant in self._tenants.items()},
                bundles=self._bundles,
                requests=self._requests,
                device_seconds=self._seconds,
                sizes=dict(sorted(self._sizes.items())),
            )

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._tenants.clear()
            self._sizes.clear()
            self._bundles = self._requests = 0
            self._seconds = 0.0

"""What each tenant got: outcomes, latencies, device seconds."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from torch_mux.errors import ExecutionFailed
from torch_mux.runtime.memory import MemoryLedger
from torch_mux.runtime.quarantine import Quarantine
from torch_mux.runtime.rates import Rates
from torch_mux.runtime.request import Request, RequestState
from torch_mux.runtime.scheduler.delays import Delay
from torch_mux.runtime.shares import PICOSECONDS, divided
from torch_mux.runtime.tally import TenantStats, TenantTally
from torch_mux.types import Quota

__all__ = ["OTHERS", "Accounting", "StatsSnapshot", "TenantStats"]

#: Tenants that are counted by name at most, and who stands for those that were.
_MOST = 4096
OTHERS: Final = "(others)"
_DONE, _CANCELLED, _EXPIRED = RequestState.DONE, RequestState.CANCELLED, RequestState.EXPIRED


@dataclass(frozen=True)
class StatsSnapshot:
    """Counters of the whole runtime at one moment.

    Attributes:
        tenants: by tenant name.
        bundles: bundles that the devices finished.
        requests: requests they carried.
        device_seconds: time in which the devices were busy with them.
        sizes: bundles by number of slots.
    """

    tenants: Mapping[str, TenantStats]
    bundles: int
    requests: int
    device_seconds: float
    sizes: Mapping[int, int]


class Accounting:
    """Counters a tenant, of bounded size; safe from any thread.

    Of more than 4,096 tenants, those with the fewest requests lately and nothing pending are counted as one,
    ``"(others)"``: sums stay what they are, and who comes again begins anew.

    Args:
        memory: what tenants hold; it is told of every end.
        quarantine: how many failures in a row are too many; see :class:`Quarantine`.
    """

    def __init__(self, memory: MemoryLedger | None = None, quarantine: Callable[[], int] = lambda: 0) -> None:
        self.memory = memory
        self.quarantine = Quarantine(quarantine)
        self.rates = Rates()
        self._lock = threading.Lock()
        self._tenants: dict[str, TenantTally] = {}
        self._gather_at = _MOST
        self._bundles = 0
        self._requests = 0
        self._device_time = 0
        self._sizes: Counter[int] = Counter()

    def _tenant(self, name: str) -> TenantTally:
        tenant = self._tenants.get(name)
        if tenant is None:
            if len(self._tenants) >= self._gather_at:
                self._gather_idle()
            tenant = self._tenants.setdefault(name, TenantTally())
        return tenant

    def _gather_idle(self) -> None:
        """Counts the half of the tenants who were idle longest as one; the lock is held."""
        idle = [(one.lately, name) for name, one in self._tenants.items() if not one.pending]
        others = self._tenants.pop(OTHERS, None) or TenantTally()
        for _, name in sorted(idle)[: _MOST // 2]:
            if name != OTHERS:
                others.add(self._tenants.pop(name))
        for one in self._tenants.values():
            one.marked = one.accepted
        self._tenants[OTHERS] = others
        self._gather_at = max(_MOST, len(self._tenants) + _MOST // 4)

    def accepted(self, quotas: Sequence[Quota]) -> None:
        """Requests under these quotas are about to be queued."""
        last: Quota | None = None
        with self._lock:
            for quota in quotas:
                if quota is not last:
                    last, tenant = quota, self._tenant(quota.tenant)
                    tenant.weight, tenant.reserve = quota.weight, quota.reserve
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
        program: object = None
        failed = foreseen = False
        with self._lock:
            for request in requests:
                quota, served = request.quota, request.instance.served
                if request.foreseen is not None:
                    foreseen = True
                if quota is not last or served is not program:
                    last, program, tenant = quota, served, self._tenant(quota.tenant)
                    model = tenant.model(served.program.name)
                if request.state is _DONE:
                    arrival = request.arrival
                    tenant.latencies.append(now - arrival if now > arrival else 0.0)
                    if request.due < now:
                        model.late += 1
                    else:
                        model.ok += 1
                else:
                    model.not_served(request.state)
                    failed = True
        if foreseen:
            self._compare(requests, now)
        if failed or self.quarantine.watching:
            self._watch(requests, now)
        if failed:
            for request in requests:
                # It was cancelled before its token was there.
                if request.state is _CANCELLED and request.eligible > now and request.quota.rate is not None:
                    self.rates.put_back(request.quota)
        if self.memory is not None:
            self.memory.release(requests)

    def _compare(self, requests: Sequence[Request], now: float) -> None:
        """What was forecast, and how long it took; who was dropped would have taken longer than he might."""
        found: dict[Delay, list[float]] = {}
        for request in requests:
            if request.foreseen is not None and (request.state is _DONE or request.state is _EXPIRED):
                delay, forecast = request.foreseen
                seconds = max(0.0, now - request.arrival)
                if request.state is _EXPIRED:
                    seconds = max(seconds, request.expires - request.arrival)
                found.setdefault(delay, []).append(seconds - forecast)
        for delay, errors in found.items():
            delay.ended(errors, now)

    def _watch(self, requests: Sequence[Request], now: float) -> None:
        for request in requests:
            key = request.quota.tenant, request.served.program.name
            if request.state is _DONE:
                self.quarantine.succeeded(key)
            elif isinstance(request.error, ExecutionFailed):
                self.quarantine.failed(key, now, request.error)

    def ran(self, requests: Sequence[Request], seconds: float, coalesced: bool) -> None:
        """A bundle of these requests took ``seconds`` of the device's busy time."""
        slots = len(requests)
        time, name = round(seconds * PICOSECONDS), requests[0].served.program.name
        coalescible, shared = int(coalesced), int(coalesced and slots > 1)
        last: Quota | None = requests[0].quota
        queued = [one.started - one.arrival if one.started > one.arrival else 0.0 for one in requests]
        alone = not [request for request in requests if request.quota is not last]
        parts = () if alone else divided(time, [request.work for request in requests])
        with self._lock:
            self._bundles += 1
            self._requests += slots
            self._device_time += time
            self._sizes[slots] += 1
            if alone:
                tenant = self._tenant(requests[0].quota.tenant).model(name)
                tenant.ran(time, slots * coalescible, slots * shared, sum(queued))
                return
            last = None
            for request, part, wait in zip(requests, parts, queued, strict=True):
                quota = request.quota
                if quota is not last:
                    last, tenant = quota, self._tenant(quota.tenant).model(name)
                tenant.ran(part, coalescible, shared, wait)

    def snapshot(self) -> StatsSnapshot:
        """Everything counted so far, as frozen data."""
        memory = self.memory
        with self._lock:
            copies = {name: tenant.copy() for name, tenant in self._tenants.items()}
            bundles, requests, time = self._bundles, self._requests, self._device_time
            sizes = dict(sorted(self._sizes.items()))
        # Sorting the latencies of many tenants takes long enough for others to wait for the lock.
        held = {name: 0 if memory is None else memory.held(name) for name in copies}
        return StatsSnapshot(
            tenants={name: tenant.snapshot(name, held[name]) for name, tenant in copies.items()},
            bundles=bundles,
            requests=requests,
            device_seconds=time / PICOSECONDS,
            sizes=sizes,
        )

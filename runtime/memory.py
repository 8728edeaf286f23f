"""Device memory by tenant: what each holds, and whether it may hold more."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from torch_mux.errors import MemoryQuotaExceeded
from torch_mux.runtime.holdings import Holdings, prepared
from torch_mux.types import Quota

if TYPE_CHECKING:
    from torch_mux.runtime.instance import Instance
    from torch_mux.runtime.request import Request

__all__ = ["MemoryLedger", "make_room", "out_of_memory"]

_MOST = 4096
_CPU_MESSAGE = "can't allocate memory"


def out_of_memory(error: BaseException | None) -> bool:
    """Whether ``error`` says that an allocation failed, on a GPU or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _CPU_MESSAGE in str(error)


def make_room(device: torch.device) -> None:
    """Gives the memory that torch keeps for later allocations back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


class MemoryLedger:
    """Bytes by tenant; safe from any thread.

    A tenant holds the weights of the models it has used with what was prepared from them, its part of the
    buffers that plans run in, and the outputs of its requests under way. What several tenants use is divided
    evenly among them. A model that was removed or collected counts no longer. Of a model that 4,096 have used
    it is forgotten who they were: those who ask again hold it.

    Args:
        instances: every instance that there is.
        pools: (device, bytes of the buffers that plans run in) of every device.
    """

    def __init__(
        self,
        instances: Callable[[], Iterable[Instance]],
        pools: Callable[[], Iterable[tuple[torch.device, int]]],
    ) -> None:
        self._instances = instances
        self._pools = pools
        self._lock = threading.Lock()
        self._flying: dict[str, int] = {}
        self._kept: Holdings | None = None
        self._fresh = False
        self._dirty: deque[Instance] = deque()

    def changed(self, instance: Instance | None = None) -> None:
        """What is prepared for an instance, or None: any of it, is not what it was. Takes no lock."""
        if instance is not None and self._kept is not None:
            self._dirty.append(instance)
        else:
            self._fresh = False
            self._kept = None

    def reserve(self, calls: Sequence[tuple[Instance, object, Quota]]) -> None:
        """Counts the outputs of these requests, (instance, inputs, quota) each, from now on, all or none.

        Raises:
            MemoryQuotaExceeded: a tenant would hold more than its quota allows.
        """
        with self._lock:
            done, flying = 0, self._flying
            joined: list[tuple[Instance, str]] = []
            try:
                last: Quota | None = None
                for instance, _, quota in calls:
                    if quota is not last:
                        last, name, limited = quota, quota.tenant, quota.memory is not None
                    before = self._held(name) if limited else None
                    if name not in instance.tenants:
                        if len(instance.tenants) >= _MOST:
                            instance.tenants, self._kept = frozenset(), None
                        instance.tenants |= {name}
                        joined.append((instance, name))
                        if self._kept is not None:
                            self._kept.join(instance, name)
                    flying[name] = flying.get(name, 0) + instance.served.output_bytes
                    done += 1
                    if before is not None:
                        self._check(instance, quota, before)
            except MemoryQuotaExceeded:
                for instance, name in joined:
                    instance.tenants -= {name}
                    self._kept = None
                self._release([(instance, quota) for instance, _, quota in calls[:done]])
                raise

    def _check(self, instance: Instance, quota: Quota, before: int) -> None:
        now = self._held(quota.tenant)
        if quota.memory is not None and now > quota.memory:
            program = instance.served.program
            raise MemoryQuotaExceeded(
                tenant=quota.tenant,
                held=before,
                device=program.device,
                model=program.name,
                asked=now - before,
                limit=quota.memory,
            )

    def release(self, requests: Iterable[Request]) -> None:
        """These requests ended: their outputs are their callers'."""
        with self._lock:
            self._release((request.instance, request.quota) for request in requests)

    def cancel(self, calls: Iterable[tuple[Instance, Quota]]) -> None:
        """Takes back :meth:`reserve` for requests that were not queued after all."""
        with self._lock:
            self._release(calls)

    def _release(self, calls: Iterable[tuple[Instance, Quota]]) -> None:
        freed: dict[str, int] = {}
        for instance, quota in calls:
            freed[quota.tenant] = freed.get(quota.tenant, 0) + instance.served.output_bytes
        flying = self._flying
        for name, count in freed.items():
            left = flying.get(name, 0) - count
            if left > 0:
                flying[name] = left
            else:
                flying.pop(name, None)

    def unaffordable(self, request: Request) -> MemoryQuotaExceeded | None:
        """Why what has to be prepared for a request may not be: its plan was not there when it was queued."""
        if request.quota.memory is None or request.instance.row is not None:
            return None
        try:
            with self._lock:
                rest = prepared(request.instance) / max(1, len(request.instance.tenants))
                self._check(request.instance, request.quota, self._held(request.quota.tenant) - round(rest))
        except MemoryQuotaExceeded as error:
            return error
        return None

    def owns(self, tenant: str) -> bool:
        """Whether a tenant has used a model that is still there."""
        return any(
            tenant in instance.tenants and instance.alive and not instance.removed
            for instance in self._instances()
        )

    def held(self, tenant: str) -> int:
        """Bytes that a tenant holds now."""
        with self._lock:
            return self._held(tenant)

    def _held(self, tenant: str) -> int:
        kept = self._kept
        if kept is None:
            self._fresh = True  # what changes meanwhile makes it False again
            self._dirty.clear()
            kept = Holdings(self._instances(), self._pools())
            self._kept = kept if self._fresh else None
        if self._dirty:
            dirty = [self._dirty.popleft() for _ in range(len(self._dirty))]
            kept.update(dirty, self._pools())
        return round(kept.of(tenant)) + self._flying.get(tenant, 0)

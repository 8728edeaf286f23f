"""Bytes by tenant of what several may use, kept up as tenants join instead of counted again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch_mux.runtime.instance import Instance

__all__ = ["Holdings", "prepared"]


class Holdings:
    """Weights, prepared copies and buffers, each divided evenly among the tenants that use it.

    Args:
        instances: all that there are; who was removed, collected or never used does not count.
        pools: (device, bytes of the buffers that plans run in).
    """

    def __init__(self, instances: Iterable[Instance], pools: Iterable[tuple[torch.device, int]]) -> None:
        self._bytes: dict[str, float] = {}
        self._parts: dict[object, tuple[int, set[str]]] = {}
        for device, nbytes in pools:
            self._part(device, nbytes)
        for instance in instances:
            for name in instance.tenants:
                self.join(instance, name)

    def of(self, tenant: str) -> float:
        """Bytes of a tenant."""
        return self._bytes.get(tenant, 0.0)

    def join(self, instance: Instance, tenant: str) -> None:
        """A tenant uses an instance; once more changes nothing."""
        if instance.removed or not instance.alive:
            return
        self._use(instance, prepared(instance), tenant)
        for tensor in instance.held:
            self._use(*_storage(tensor), tenant)
        self._use(instance.served.program.device, 0, tenant)

    def update(self, instances: Iterable[Instance], pools: Iterable[tuple[torch.device, int]]) -> None:
        """What is prepared for these instances, or the size of the buffers, is not what it was."""
        for instance in instances:
            if instance in self._parts:
                self._resize(instance, prepared(instance))
        for device, nbytes in pools:
            self._resize(device, nbytes)

    def _resize(self, what: object, nbytes: int) -> None:
        before, tenants = self._part(what, nbytes)
        for name in tenants:
            self._bytes[name] += (nbytes - before) / len(tenants)
        self._parts[what] = nbytes, tenants

    def _part(self, what: object, nbytes: int) -> tuple[int, set[str]]:
        part = self._parts.get(what)
        if part is None:
            part = self._parts[what] = nbytes, set()
        return part

    def _use(self, what: object, nbytes: int, tenant: str) -> None:
        nbytes, tenants = self._part(what, nbytes)
        if tenant in tenants:
            return
        count = len(tenants)
        for name in tenants:
            self._bytes[name] -= nbytes / count - nbytes / (count + 1)
        tenants.add(tenant)
        self._bytes[tenant] = self._bytes.get(tenant, 0.0) + nbytes / (count + 1)


def _storage(tensor: Tensor) -> tuple[object, int]:
    """(what tells its memory from others', bytes); subclasses and sparse tensors have no storage to ask."""
    try:
        storage = tensor.untyped_storage()
        return (tensor.device, storage.data_ptr()), storage.nbytes()
    except (RuntimeError, NotImplementedError):
        return id(tensor), tensor.numel() * tensor.element_size()


def prepared(instance: Instance) -> int:
    """Bytes prepared for an instance, or that will be once it runs; 0 while its plan compiles or rests."""
    served = instance.served
    plan = served.plan
    if plan is None or not plan.coalesced or (served.retired is not None and instance.row is None):
        return 0
    return plan.storage.nbytes(instance.row)

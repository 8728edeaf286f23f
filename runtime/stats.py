"""What one tenant got so far: plain data that the user keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["ModelStats", "TenantStats"]


@dataclass(frozen=True)
class ModelStats:
    """What one tenant got of one model's class.

    Attributes:
        ok, late, expired, cancelled, errors: its requests that ended, by outcome; see :class:`TenantStats`.
        device_seconds, queue_seconds: as there.
        coalesced_share: as there.
    """

    ok: int
    late: int
    expired: int
    cancelled: int
    errors: int
    device_seconds: float
    queue_seconds: float
    coalesced_share: float | None


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
        device_seconds: device time, that of a bundle divided over its slots by their work. While bundles of
            several lanes are at work the time is divided among them by their caps, so that the sum over
            tenants is the time in which the device was busy.
        queue_seconds: time its requests spent queued, in sum.
        held: bytes that it holds now, see :class:`torch_mux.runtime.memory.MemoryLedger`.
        late: requests that were served, but after their ``slo`` or ``deadline``.
        expired: requests that were dropped because their ``deadline`` had passed.
        refused: requests that were not accepted: a limit of their quota said no.
        weight, reserve: of the quota that its last accepted request ran under.
        coalesced_share: part of its requests to coalesced plans that shared their bundle, None before the
            first.
        models: the same by model, for what has ended.
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
    reserve: float = 0.0
    models: Mapping[str, ModelStats] = field(default_factory=dict)

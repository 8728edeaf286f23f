"""Counters of one tenant, by model."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from torch_mux.runtime.request import RequestState
from torch_mux.runtime.shares import PICOSECONDS

__all__ = ["ModelStats", "Tally", "TenantStats", "TenantTally"]

_WINDOW: Final = 2048
_CANCELLED, _EXPIRED = RequestState.CANCELLED, RequestState.EXPIRED


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


class Tally:
    """Counters of requests that went out or ended."""

    __slots__ = (
        "cancelled",
        "coalescible",
        "device_time",
        "errors",
        "expired",
        "late",
        "ok",
        "queue_seconds",
        "shared",
    )

    def __init__(self) -> None:
        self.ok = self.late = self.errors = self.cancelled = self.expired = 0
        self.coalescible = self.shared = 0
        self.device_time = 0  # picoseconds
        self.queue_seconds = 0.0

    @classmethod
    def sum(cls, parts: Iterable[Tally]) -> Tally:
        """All of them together."""
        whole = cls()
        for part in parts:
            for name in cls.__slots__:
                setattr(whole, name, getattr(whole, name) + getattr(part, name))
        return whole

    def not_served(self, state: RequestState) -> None:
        """A request ended without an answer."""
        if state is _CANCELLED:
            self.cancelled += 1
        elif state is _EXPIRED:
            self.expired += 1
        else:
            self.errors += 1

    def ran(self, time: int, coalescible: int, shared: int, queued: float) -> None:
        """Requests took so many picoseconds of the device, after so many seconds in the queue."""
        self.device_time += time
        self.coalescible += coalescible
        self.shared += shared
        self.queue_seconds += queued

    @property
    def ended(self) -> int:
        """Requests that ended, however."""
        return self.ok + self.late + self.errors + self.cancelled + self.expired

    @property
    def coalesced_share(self) -> float | None:
        """Part of those that could share a bundle."""
        return self.shared / self.coalescible if self.coalescible else None

    def stats(self) -> ModelStats:
        """As frozen data."""
        return ModelStats(
            ok=self.ok,
            late=self.late,
            expired=self.expired,
            cancelled=self.cancelled,
            errors=self.errors,
            device_seconds=self.device_time / PICOSECONDS,
            queue_seconds=self.queue_seconds,
            coalesced_share=self.coalesced_share,
        )


class TenantTally:
    """Counters of one tenant; guarded by the accounting's lock."""

    __slots__ = ("_models", "accepted", "latencies", "marked", "refused", "reserve", "weight")

    def __init__(self) -> None:
        self.accepted = self.refused = self.marked = 0
        self.weight, self.reserve = 1.0, 0.0
        self.latencies: deque[float] = deque(maxlen=_WINDOW)
        self._models: dict[str, Tally] = {}

    @property
    def device_time(self) -> int:
        """Picoseconds of the device."""
        return sum([model.device_time for model in self._models.values()])

    @property
    def pending(self) -> int:
        """Requests queued or under way."""
        return self.accepted - sum([model.ended for model in self._models.values()])

    @property
    def lately(self) -> int:
        """Requests since ``marked`` was set."""
        return self.accepted - self.marked

    def add(self, other: TenantTally) -> None:
        """Counts what another tenant had as this one's."""
        self.accepted += other.accepted
        self.refused += other.refused
        self.latencies.extend(other.latencies)
        for name, tally in other._models.items():
            self._models[name] = Tally.sum([self.model(name), tally])

    def model(self, name: str) -> Tally:
        """The counters of one model."""
        found = self._models.get(name)
        if found is None:
            found = self._models[name] = Tally()
        return found

    def copy(self) -> TenantTally:
        """The same counters, which no longer change."""
        other = TenantTally()
        other.accepted, other.refused = self.accepted, self.refused
        other.weight, other.reserve = self.weight, self.reserve
        other.latencies = self.latencies.copy()
        other._models = {name: Tally.sum([model]) for name, model in self._models.items()}
        return other

    def snapshot(self, name: str, held: int) -> TenantStats:
        """Everything so far."""
        ordered, whole = sorted(self.latencies), Tally.sum(self._models.values())
        return TenantStats(
            tenant=name,
            accepted=self.accepted,
            ok=whole.ok,
            errors=whole.errors,
            cancelled=whole.cancelled,
            pending=self.accepted - whole.ended,
            p50=_quantile(ordered, 0.5),
            p99=_quantile(ordered, 0.99),
            device_seconds=whole.device_time / PICOSECONDS,
            queue_seconds=whole.queue_seconds,
            coalesced_share=whole.coalesced_share,
            held=held,
            late=whole.late,
            expired=whole.expired,
            refused=self.refused,
            weight=self.weight,
            reserve=self.reserve,
            models={model: tally.stats() for model, tally in self._models.items()},
        )


def _quantile(ordered: Sequence[float], q: float) -> float | None:
    """The nearest-rank quantile of sorted values."""
    if not ordered:
        return None
    return ordered[min(len(ordered) - 1, max(0, -int(-q * len(ordered) // 1) - 1))]

"""Whether the runtime can still serve, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch_mux.runtime.executors.base import Executor
    from torch_mux.runtime.served import ServedProgram

__all__ = ["DeviceHealth", "EngineHealth"]


@dataclass(frozen=True)
class DeviceHealth:
    """One device.

    Attributes:
        device: its name in torch.
        fault: what the device reported that only a new process ends (a sticky CUDA error), or None.
        pending: requests that wait to go out.
        oldest: seconds that the oldest of them has waited, 0 without one.
        flying: whether bundles are under way.
    """

    device: str
    fault: str | None
    pending: int
    oldest: float
    flying: bool

    @classmethod
    def of(cls, executor: Executor, arrivals: Sequence[float], now: float) -> DeviceHealth:
        """What an executor says, and requests that arrived at these seconds and still wait at ``now``."""
        fault = executor.fault
        return cls(
            device=str(executor.device),
            fault=None if fault is None else f"{type(fault).__name__}: {fault}".split("\n")[0],
            pending=len(arrivals),
            oldest=max(0.0, now - min(arrivals)) if arrivals else 0.0,
            flying=executor.flying(),
        )


@dataclass(frozen=True)
class EngineHealth:
    """The engine.

    Attributes:
        closed: it takes no requests.
        devices: those that have served.
        compiling: programs whose plans are not there yet.
        failed: programs without a plan, with the error.
        quarantined: seconds for which tenants are still held off, by (tenant, model).
    """

    closed: bool
    devices: tuple[DeviceHealth, ...]
    compiling: tuple[str, ...]
    failed: Mapping[str, str]
    quarantined: Mapping[tuple[str, str], float]

    @classmethod
    def of(
        cls,
        closed: bool,
        devices: tuple[DeviceHealth, ...],
        programs: Sequence[ServedProgram],
        quarantined: Mapping[tuple[str, str], float],
    ) -> EngineHealth:
        """What these programs and devices add up to."""
        return cls(
            closed,
            devices,
            tuple(one.program.name for one in programs if not one.ready),
            {one.program.name: f"{type(one.error).__name__}: {one.error}" for one in programs if one.error},
            quarantined,
        )

"""What ``torch_mux.health()`` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from torch_mux import state

if TYPE_CHECKING:
    from torch_mux.runtime.health import DeviceHealth

__all__ = ["Health", "condition"]

#: Seconds after which a request that has not gone out is worth a word.
_SLOW: Final = 10.0


@dataclass(frozen=True)
class Health:
    """How the process is, for a health check.

    Attributes:
        status: "ok"; "degraded": everybody else is served; "failed": this process will serve nothing more on
            some device, or is closed.
        reasons: why it is not "ok", a sentence each.
        devices: those that have served (``torch_mux.runtime.health.DeviceHealth``).
        compiling: models whose plans are not there yet: their requests wait.
        failed: models without a plan, with the error.
        quarantined: seconds for which tenants are still held off, by (tenant, model).
    """

    status: str = "ok"
    reasons: tuple[str, ...] = ()
    devices: tuple[DeviceHealth, ...] = ()
    compiling: tuple[str, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    quarantined: Mapping[tuple[str, str], float] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [self.status, *self.reasons]
        for one in self.devices:
            waiting = f", the oldest for {one.oldest:.1f} s" if one.pending else ""
            lines.append(f"{one.device}: {one.pending} requests pending{waiting}")
        if self.compiling:
            lines.append(f"compiling: {', '.join(self.compiling)}")
        return "\n".join(lines)


def condition() -> Health:
    """The engine's health in words; that of a process which has served nothing is "ok"."""
    engine = state.peek()
    if engine is None:
        return Health()
    found = engine.health()
    broken = [
        f"{one.device} has failed, start a new process: {one.fault}" for one in found.devices if one.fault
    ]
    if found.closed:
        broken.append("torch_mux is closed; torch_mux.reset() opens it again")
    weak = [f"{name} has no plan: {error}" for name, error in found.failed.items()]
    weak += [
        f"tenant {tenant!r} is held off from {model} for another {left:.1f} s, its requests keep raising"
        for (tenant, model), left in found.quarantined.items()
    ]
    weak += [
        f"a request has waited for {one.device} for {one.oldest:.0f} s"
        for one in found.devices
        if one.oldest > _SLOW and not found.compiling
    ]
    return Health(
        status="failed" if broken else "degraded" if weak else "ok",
        reasons=(*broken, *weak),
        devices=found.devices,
        compiling=found.compiling,
        failed=found.failed,
        quarantined=found.quarantined,
    )

"""What ``stats()`` and ``explain()`` return: plain data first, text second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from torch_mux import state
from torch_mux.settings import Settings
from torch_mux.types import FallbackReason

if TYPE_CHECKING:
    from torch_mux.runtime.accounting import TenantStats
    from torch_mux.runtime.mixes import MixReport
    from torch_mux.runtime.report import ProgramReport

__all__ = ["Explanation", "Note", "ProgramExplanation", "Stats", "explanation", "statistics"]


_KEPT = {
    "off": "; reserves are not acted on (isolation='off')",
    "priority": ", one of high priority for tenants with a reserve (isolation='priority')",
    "caps": ", one of high priority for tenants with a reserve, kept free by the caps of others while in use "
    "(isolation='caps')",
    "green": ", one for tenants with a reserve and one for the others while it is in use, each on "
    "multiprocessors of its own (isolation='green')",
}
_COLUMNS = tuple(
    "tenant,accepted,ok,late,expired,cancelled,errors,pending,refused,p50 ms,p99 ms,device s,share,reserve,"
    "coalesced,held MiB".split(",")
)


@dataclass(frozen=True)
class Stats:
    """What the process served so far.

    Attributes:
        tenants: by tenant name (``torch_mux.runtime.accounting.TenantStats``).
        bundles, requests: bundles that ran, and the requests in them.
        device_seconds: time in which the devices were busy with them.
        sizes: how many bundles ran with so many slots.
    """

    tenants: Mapping[str, TenantStats] = field(default_factory=dict)
    bundles: int = 0
    requests: int = 0
    device_seconds: float = 0.0
    sizes: Mapping[int, int] = field(default_factory=dict)

    @property
    def shares(self) -> dict[str, float]:
        """Which part of the device time each tenant got."""
        whole = self.device_seconds or 1.0
        return {name: got.device_seconds / whole for name, got in self.tenants.items()}

    def __str__(self) -> str:
        head = (
            f"{self.requests} requests in {self.bundles} bundles, {self.device_seconds:.3f} s of the device"
        )
        rows: list[tuple[str, ...]] = [_COLUMNS]
        for name in sorted(self.tenants):
            got = self.tenants[name]
            ends = (got.ok, got.late, got.expired, got.cancelled, got.errors)
            rows.append(
                (
                    name,
                    *map(str, (got.accepted, *ends, got.pending, got.refused)),
                    _ms(got.p50),
                    _ms(got.p99),
                    f"{got.device_seconds:.3f}",
                    f"{self.shares[name]:.1%}",
                    f"{got.reserve:.0%}" if got.reserve else "-",
                    "-" if got.coalesced_share is None else f"{got.coalesced_share:.0%}",
                    f"{got.held / 2**20:.1f}",
                )
            )
        return "\n".join([head, *_aligned(rows)]) if self.tenants else head


@dataclass(frozen=True)
class ProgramExplanation:
    """One program: what of it coalesces and what does not.

    Attributes:
        name: model it was captured from.
        fingerprint: its identity.
        status: "ready", "compiling" or "failed".
        error: why it did not compile, or None.
        coalesced: whether several requests share one run; None while it compiles.
        instances: models with weights of their own that run it.
        nbytes: bytes held for them beyond their own weights.
        kernels: super-kernel operations by name.
        fused: operations absorbed into epilogues or into the preparation of an instance.
        inductor: operations in the batched graph that Inductor compiles.
        alone: operations that run per instance.
        reasons: why what falls back falls back.
        counts: how many operations fall back for each reason.
        flops: floating-point operations of one request, in convolutions, matrix products and attention.
        flops_alone: those of them that run per instance.
        bundles: bundles that went out, by number of slots.
        captured: bundle sizes captured as CUDA graphs, by lane.
        capture_failures: why sizes could not be captured.
        segments: of the captured graph with the most, between which a more urgent bundle may go first.
    """

    name: str
    fingerprint: str
    status: str
    error: str | None
    coalesced: bool | None
    instances: int
    nbytes: int
    kernels: Mapping[str, int]
    fused: int
    inductor: int
    alone: int
    reasons: tuple[FallbackReason, ...]
    bundles: Mapping[int, int]
    captured: tuple[tuple[int, ...], ...] = ()
    capture_failures: tuple[str, ...] = ()
    counts: Mapping[FallbackReason, int] = field(default_factory=dict)
    flops: int = 0
    flops_alone: int = 0
    compile_seconds: float = 0.0
    from_disk: bool = False
    segments: int = 1

    @property
    def coalesced_flops(self) -> float | None:
        """Share of the floating-point operations that requests run together; None where there are none."""
        return 1 - self.flops_alone / self.flops if self.flops else None

    def __str__(self) -> str:
        kind = {None: "", True: ", coalesced", False: ", per instance"}[self.coalesced]
        lines = [
            f"{self.name} {self.fingerprint[:12]}: {self.status}{kind}; {_count(self.instances, 'instance')}"
        ]
        if self.error is not None:
            lines.append(f"  {self.error}")
        if self.nbytes:
            lines[0] += f", {self.nbytes / 2**20:.1f} MiB beyond their weights"
        if self.status == "ready":
            kernels = ", ".join(f"{count} {name}" for name, count in sorted(self.kernels.items())) or "none"
            lines.append(f"  super-kernels: {kernels}")
            batched = f"{self.inductor} in the batched graph"
            share = self.coalesced_flops
            work = "" if share is None else f"; {share:.0%} of the FLOPs coalesced"
            lines.append(f"  operations: {self.fused} fused, {batched}, {self.alone} per instance{work}")
        if self.bundles:
            lines.append(
                "  bundles: "
                + ", ".join(f"{count} of {slots}" for slots, count in sorted(self.bundles.items()))
            )
        if any(self.captured):
            cut = f" (in up to {self.segments} segments)" if self.segments > 1 else ""
            lines.append(
                "  captured for: "
                + "; ".join(", ".join(map(str, sizes)) for sizes in self.captured if sizes)
                + cut
            )
        lines += [f"  not captured: {failure}" for failure in self.capture_failures]
        for reason in self.reasons:
            count = self.counts.get(reason, 1)
            lines.append(f"  {reason}" + (f", {count} operations" if count > 1 else ""))
        return "\n".join(lines)


@dataclass(frozen=True)
class Note:
    """A fall-back of a whole model or call, and how often it was noted."""

    reason: FallbackReason
    count: int

    def __str__(self) -> str:
        return str(self.reason) if self.count == 1 else f"{self.reason}, {self.count} times"


@dataclass(frozen=True)
class Explanation:
    """What coalesced, what did not, and why.

    Attributes:
        device: what requests run on.
        settings: in force.
        programs: every program seen so far.
        mixes: the mixes of programs that went out as one, or could.
        notes: models and calls that no program tells about: not reached, training, guarded.
    """

    device: str
    settings: Settings
    programs: tuple[ProgramExplanation, ...] = ()
    notes: tuple[Note, ...] = ()
    mixes: tuple[MixReport, ...] = ()

    def __str__(self) -> str:
        lines = [f"torch-mux on {self.device}"]
        if not self.settings.enabled:
            lines.append("disabled: new graphs go to Inductor whole; configure(enabled=True) turns it on")
        lines.append(_isolation(self.settings))
        lines += [str(program) for program in self.programs] or ["no program was captured yet"]
        lines += [line for mix in self.mixes for line in _mix_lines(mix)]
        if self.notes:
            lines.append("notes:")
            lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)


def statistics() -> Stats:
    """Counters of the engine, or nothing where there is none yet."""
    engine = state.peek()
    if engine is None:
        return Stats()
    found = engine.stats()
    return Stats(found.tenants, found.bundles, found.requests, found.device_seconds, found.sizes)


def explanation() -> Explanation:
    """Programs of the engine and notes of the face."""
    engine = state.peek()
    plans = engine.plans() if engine is not None else ()
    return Explanation(
        _device(),
        state.settings(),
        tuple(_program(plan) for plan in plans),
        tuple(Note(reason, count) for reason, count in state.notes()),
        engine.mixes() if engine is not None else (),
    )


def _mix_lines(mix: MixReport) -> list[str]:
    """A mix with its words: strands side by side, what is one launch in brackets."""
    members = " + ".join(f"{name} x{slots}" for name, slots in mix.members)
    lines = [f"mix {members}: {mix.state}; {_count(mix.seen, 'bundle')}, {mix.joint} as one"]
    lines += [f"  {line}" for line in (mix.reason, mix.measured) if line]
    if mix.words:
        counts = f"{mix.launches} super-kernels, {mix.matched} launches for several programs"
        expected = f"{mix.seconds * 1e6:.0f} of {mix.serial * 1e6:.0f} us one after another"
        lines += [f"  {counts}; expected {expected}", *(f"    {line}" for line in mix.words.split("\n"))]
    return lines


def _device() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} (captured CUDA graphs)"
    return "the CPU: right answers, but sms quotas and lanes are recorded, not enforced"


def _isolation(settings: Settings) -> str:
    """Which lanes there are and what keeps a reserve free."""
    lanes, branches = _count(settings.lanes, "lane"), settings.branches
    if branches is None:
        branches = 4 if torch.cuda.is_available() else 1
    lanes += "" if branches == 1 else f" of {branches} branches"
    passing = settings.segment is not None and settings.isolation != "green"
    cut = f"; long plans are cut into segments of {_ms(settings.segment)} ms" if passing else ""
    return f"{lanes} for everybody" + _KEPT[settings.isolation] + cut


def _program(found: ProgramReport) -> ProgramExplanation:
    plan: Any = found.plan
    return ProgramExplanation(
        name=found.name,
        fingerprint=found.fingerprint,
        status=found.status,
        error=found.error,
        coalesced=found.coalesced,
        instances=found.instances,
        nbytes=found.nbytes,
        kernels=dict(plan.kernels) if plan is not None else {},
        fused=plan.fused if plan is not None else 0,
        inductor=plan.inductor if plan is not None else 0,
        alone=plan.alone if plan is not None else 0,
        reasons=found.reasons,
        bundles=found.sizes,
        captured=found.captured,
        capture_failures=found.capture_failures,
        counts=dict(plan.counts) if plan is not None else {},
        flops=plan.flops if plan is not None else 0,
        flops_alone=plan.flops_alone if plan is not None else 0,
        compile_seconds=found.compile_seconds,
        from_disk=found.from_disk,
        segments=found.segments,
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f}"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]

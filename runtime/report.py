"""What the runtime knows of each program, as frozen data for ``explain()``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from torch_mux.runtime.served import ServedProgram
from torch_mux.types import FallbackReason

__all__ = ["ProgramReport", "report_of"]


@dataclass(frozen=True)
class ProgramReport:
    """One program and what became of it.

    Attributes:
        name: the model's class as a person would call it.
        fingerprint: identity of the program.
        device: where its tensors live.
        status: "compiling", "ready" or "failed".
        error: why it did not compile, or None.
        instances: modules known by now.
        nbytes: bytes held for them beyond their own weights: prepared copies and rows of the tables.
        coalesced: whether one run serves many slots; None while it compiles.
        capturable: whether bundles are replayed from CUDA graphs; None while it compiles.
        reasons: why operations, or all of it, are not coalesced.
        changes: path changes in order: why its plan was retired, None where it was taken again.
        plan: lowering's own report, or None while it compiles.
        captured: bundle sizes captured as CUDA graphs, by lane.
        capture_failures: why sizes could not be captured.
        segments: of the captured graph with the most, between which a more urgent bundle may go first.
        sizes: bundles that went out, by number of slots.
        compile_seconds: how long the plan took to make, or to load.
        from_disk: whether an earlier process had left the plan.
    """

    name: str
    fingerprint: str
    device: torch.device
    status: str
    error: str | None
    instances: int
    nbytes: int
    coalesced: bool | None
    capturable: bool | None
    reasons: tuple[FallbackReason, ...]
    changes: tuple[FallbackReason | None, ...]
    plan: object
    captured: tuple[tuple[int, ...], ...]
    capture_failures: tuple[str, ...]
    segments: int
    sizes: Mapping[int, int]
    compile_seconds: float
    from_disk: bool


def report_of(served: ServedProgram) -> ProgramReport:
    """The report of one program as it is now."""
    program, plan = served.program, served.plan
    executor = served.dispatcher.executor.report(served)
    rows = [instance.row for instance in served.instances]
    failed = served.error is not None
    return ProgramReport(
        name=program.name,
        fingerprint=program.fingerprint,
        device=program.device,
        status="failed" if failed else "ready" if served.ready else "compiling",
        error=f"{type(served.error).__name__}: {served.error}" if failed else None,
        instances=len(rows),
        nbytes=sum(plan.storage.nbytes(row) for row in rows if row is not None) if plan is not None else 0,
        coalesced=None if plan is None else plan.coalesced and served.retired is None,
        capturable=None if plan is None else plan.capturable,
        reasons=() if plan is None else tuple(filter(None, (served.retired, served.stuck, *plan.reasons))),
        changes=tuple(served.changes),
        plan=None if plan is None else plan.report,
        captured=executor.captured,
        capture_failures=executor.failures,
        segments=executor.segments,
        sizes=dict(sorted(served.sizes.items())),
        compile_seconds=served.compile_seconds,
        from_disk=plan is not None and plan.from_disk,
    )

"""One architecture of the zoo, in a process of its own: ``python -m torch_mux.bench.zoo_entry``.

The row is written after every step, so that what was measured before a failure, a crash or the time limit
is kept.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torch_mux
from torch_mux.bench import measure
from torch_mux.bench.contenders import Contender, Eager, Mux, OneByOne, synchronize
from torch_mux.bench.workloads import DTYPES, Tenants, Workload, build
from torch_mux.types import FallbackKind

__all__ = ["SLOTS", "STEPS", "main", "row_of"]

SLOTS = 4
Save = Callable[[dict[str, Any]], object]


@dataclass
class _Entry:
    """What the steps of one entry share. The tenants are one more than a bundle: the further instance."""

    workload: Workload
    device: torch.device
    dtype: torch.dtype
    save: Save
    row: dict[str, Any] = field(default_factory=dict)
    made: Tenants | None = None
    exact: list[list[Tensor]] = field(default_factory=list)

    @property
    def tenants(self) -> Tenants:
        if self.made is None:
            raise RuntimeError("the model could not be built")
        return self.made

    def put(self, **values: Any) -> None:
        self.row.update(values)
        self.save(self.row)


def row_of(workload: Workload, device: torch.device, dtype: torch.dtype, save: Save) -> dict[str, Any]:
    """Measures one architecture; ``save`` gets the row as it is after every step.

    A step that fails leaves its error in the row under ``errors``, by its name, and the next one is tried.
    """
    start = time.perf_counter()
    entry = _Entry(workload, device, dtype, save)
    entry.put(model=workload.name, errors={})
    for name, step in _STEPS.items():
        try:
            with torch.no_grad() if name in ("build", "exact") else torch.inference_mode():
                step(entry)
        except Exception as error:
            traceback.print_exc()
            entry.row["errors"][name] = f"{type(error).__name__}: {str(error).strip()}"[:500]
        entry.put(seconds=time.perf_counter() - start)
        if entry.made is None:
            break
    return entry.row


def _build(entry: _Entry) -> None:
    entry.made = build(entry.workload, SLOTS + 1, entry.device, entry.dtype, variants=1)
    entry.put(weights=entry.made.weight_bytes())


def _exact(entry: _Entry) -> None:
    entry.exact = measure.references(entry.tenants)


def _eager(entry: _Entry) -> None:
    eager = Eager()
    eager.prepare(entry.tenants, (SLOTS,))
    entry.put(eager=_compared(eager, entry))


def _compared(contender: Contender, entry: _Entry) -> dict[str, Any]:
    if not entry.exact:
        raise RuntimeError("there is no float64 answer to compare with")
    return measure.errors(contender, entry.tenants, entry.exact, SLOTS)


def _machinery(entry: _Entry) -> None:
    """Inductor's own start, so that no contender is charged for it."""
    torch.compile(lambda x: (x + 1).sum())(torch.ones(64, device=entry.device))
    torch.compiler.reset()


def _mux(entry: _Entry) -> None:
    mux = Mux(raw=True)
    start = time.perf_counter()
    mux.prepare(entry.tenants, (SLOTS,))
    synchronize(entry.tenants.requests[0])
    entry.put(compile_seconds=time.perf_counter() - start)
    entry.put(**_explained())
    entry.put(mux=_compared(mux, entry))
    entry.put(same_bits=_same_bits(mux, entry.tenants))
    entry.put(launches=measure.launches(mux, entry.tenants, SLOTS))
    entry.put(memory=_further(mux, entry))
    mux.release()


def _explained() -> dict[str, Any]:
    """What of it coalesces, by the programs' operations, and why the rest does not."""
    found = torch_mux.explain()
    reasons: Counter[tuple[str, str, str]] = Counter()
    for program in found.programs:
        for reason, count in program.counts.items():
            reasons[reason.kind.name, reason.target, reason.detail] += count
    notes = [(note.reason.kind.name, note.reason.target, note.reason.detail) for note in found.notes]
    work = sum(program.flops for program in found.programs)
    alone = sum(program.flops_alone for program in found.programs)
    reached = bool(found.programs) and all(program.status == "ready" for program in found.programs)
    guarded = {FallbackKind.GUARDED.name, FallbackKind.NOT_REACHED.name}
    return {
        "programs": len(found.programs),
        "operations": {
            "super_kernels": sum(sum(program.kernels.values()) for program in found.programs),
            "batched": sum(program.inductor for program in found.programs),
            "fused": sum(program.fused for program in found.programs),
            "alone": sum(program.alone for program in found.programs),
        },
        "flops": work,
        "coalesced": 1 - alone / work if work and reached else None,
        "path": "guarded" if any(kind in guarded for kind, _, _ in notes) else "learned",
        "reasons": [
            {"kind": kind, "target": target, "detail": detail, "count": count}
            for (kind, target, detail), count in reasons.most_common()
        ],
        "notes": [{"kind": kind, "target": target, "detail": detail} for kind, target, detail in notes],
    }


def _same_bits(mux: Mux, tenants: Tenants) -> bool:
    """Whether every tenant's answer of a bundle is the one that it gets alone."""
    row = tenants.requests[0][:SLOTS]
    together = [tenants.workload.tensor(answer).clone() for answer in mux.round(row)]
    for place, (args, answer) in enumerate(zip(row, together, strict=True)):
        (alone,) = torch_mux.gather((mux.models[place], *args))
        if not torch.equal(tenants.workload.tensor(alone), answer):
            return False
    return True


def _further(mux: Mux, entry: _Entry) -> dict[str, int | None]:
    """Bytes that one more instance of a served architecture takes beyond its own weights.

    ``held`` is what the engine says that it holds for an instance; ``device`` is by the allocator.
    """
    held = [program.nbytes // max(1, program.instances) for program in torch_mux.explain().programs]
    if entry.device.type != "cuda":
        return {"held": sum(held), "device": None}
    args = entry.tenants.requests[0]
    for _ in range(2):  # a bundle of one is captured before the bytes are read
        mux.round(args[:1])
        torch_mux.warmup(mux.models[0], *args[0], sizes=(1,))
    before = measure.Memory.now(entry.device).allocated
    torch_mux.gather((mux.models[SLOTS], *args[SLOTS]))
    after = measure.Memory.now(entry.device).allocated
    return {"held": sum(held), "device": after - before}


def _inductor(entry: _Entry) -> None:
    torch_mux.reset()
    torch.compiler.reset()
    peer = OneByOne()
    start = time.perf_counter()
    peer.prepare(entry.tenants, (SLOTS,))
    synchronize(entry.tenants.requests[0])
    entry.put(inductor_seconds=time.perf_counter() - start)
    entry.put(inductor=_compared(peer, entry))
    entry.put(inductor_launches=measure.launches(peer, entry.tenants, SLOTS))


_STEPS: dict[str, Callable[[_Entry], None]] = {
    "build": _build,
    "exact": _exact,
    "eager": _eager,
    "machinery": _machinery,
    "mux": _mux,
    "inductor": _inductor,
}
#: The steps of an entry in order, as they appear under ``errors``.
STEPS = tuple(_STEPS)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures one entry into a file; 1 where a step failed."""
    parser = argparse.ArgumentParser(prog="python -m torch_mux.bench.zoo_entry", description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=sorted(DTYPES))
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    from torch_mux.bench.zoo_models import entry_of

    def save(row: dict[str, Any]) -> None:
        fresh = options.out.with_suffix(".part")
        fresh.write_text(json.dumps(row, default=str))
        fresh.replace(options.out)

    row = row_of(entry_of(options.name), torch.device(options.device), DTYPES[options.dtype], save)
    torch_mux.close()
    return int(bool(row["errors"]))


if __name__ == "__main__":
    sys.exit(main())

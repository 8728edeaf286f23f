"""How long a further tenant of a known architecture takes to be ready, and what its memory comes to."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from torch_mux import state
from torch_mux.bench import measure
from torch_mux.bench.measures.stage import Newcomer, Stage, newcomers

__all__ = ["further_tenant", "memory"]

_NEWCOMERS = 4


def further_tenant(stage: Stage) -> dict[str, Any]:
    """Milliseconds until each of some further tenants is bound and prepared and has its first answer."""
    found = list(newcomers(stage, _NEWCOMERS))
    return {
        "ready_ms": [round(1e3 * (each.bind + each.first), 3) for each in found],
        "second_answer_ms": [round(1e3 * each.second, 3) for each in found],
        "traces": sum(each.traces for each in found),
        "new_programs": sum(each.programs for each in found),
        "worst_error": max(each.error for each in found),
    }


def memory(stage: Stage) -> dict[str, Any]:
    """Device bytes of a further tenant beyond its weights, plain and adopted; then of all sizes from 1 to 16.

    Nobody counts those of a CPU, and the entry says so.
    """
    weights = stage.tenants.weight_bytes()
    entry: dict[str, Any] = {"counted": stage.tenants.device.type == "cuda", "weights": weights}
    if not entry["counted"]:
        return entry
    for name, adopted in (("plain", False), ("adopted", True)):
        entry[name] = _share(list(newcomers(stage, _NEWCOMERS, adopted)), weights)
    return entry | {"sizes_1_to_16": _all_sizes(stage)}


def _share(found: list[Newcomer], weights: int) -> dict[str, Any]:
    extra = statistics.median(each.memory["allocated"] for each in found)
    return {
        "extra": [each.memory for each in found],
        "times_its_weights": round(1 + extra / weights, 4),
    }


def _all_sizes(stage: Stage) -> dict[str, Any]:
    """What capturing them adds to tensors, to what the allocator holds, and to the whole device."""

    def now() -> dict[str, int]:
        got = measure.Memory.now(stage.tenants.device)
        free, total = torch.cuda.mem_get_info(stage.tenants.device)
        return {"allocated": got.allocated, "reserved": got.reserved, "device": total - free}

    before = now()
    for size in range(1, 17):
        stage.ask(size)
        state.engine().quiesce()
        stage.ask(size)
    after = now()
    return {
        "captured": sorted(stage.captured),
        "added": {name: after[name] - before[name] for name in after},
        "in_all": after,
    }

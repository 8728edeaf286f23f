"""Latency against the part of the multiprocessors that a quota leaves."""

from __future__ import annotations

from typing import Any, Final

import torch_mux
from torch_mux.bench import measure
from torch_mux.bench.measures.stage import Stage

__all__ = ["CAPS", "caps"]

CAPS: Final = (0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
_REPETITIONS: Final = 3


def caps(stage: Stage) -> dict[str, Any]:
    """Microseconds of a round that is waited for, by number of tenants and by ``sms``; caps take turns.

    On a CPU ``sms`` is recorded and not enforced, and the entry says so.
    """
    rounds = max(1, stage.rounds // 10)
    found: dict[int, dict[float, list[float]]] = {}
    for count in stage.counts:
        times: dict[float, list[float]] = {cap: [] for cap in CAPS}
        for _ in range(_REPETITIONS):
            for cap, each in times.items():
                with torch_mux.quota(f"bench-capped-{cap}", sms=cap):
                    each.append(measure.synchronised(stage.mux, stage.tenants, count, rounds))
        found[count] = times
    return {
        "enforced": stage.tenants.device.type == "cuda",
        "latency_us": {
            count: {cap: measure.Spread.of(each).data() for cap, each in times.items()}
            for count, times in found.items()
        },
    }

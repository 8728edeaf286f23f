"""Where the device's time goes in a round: every launch, how long it takes and what is idle before it."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from torch_mux.bench.measures.stage import Stage

__all__ = ["launches", "rounds_of"]

_ROUNDS: Final = 12
_WARM: Final = 3
_DEVICE: Final = ("kernel", "gpu_memcpy", "gpu_memset")


def launches(stage: Stage) -> dict[str, Any]:
    """By number of tenants: every launch of a round, its grid, its microseconds and the idle ones before it.

    Medians over rounds that follow each other, by the profiler, which makes what is short a little longer.
    """
    if stage.tenants.device.type != "cuda":
        return {"profiled": False}
    return {"profiled": True, "rounds": {count: _launches(stage, count) for count in stage.counts}}


def _launches(stage: Stage, count: int) -> dict[str, Any]:
    stage.ask(count)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(_ROUNDS):
            stage.mux.round(stage.tenants.requests[0][:count])
        stage.wait()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return rounds_of([event for event in events if event.get("cat") in _DEVICE], _ROUNDS)


def rounds_of(events: Sequence[dict[str, Any]], rounds: int) -> dict[str, Any]:
    """The launches of one of ``rounds`` equal rounds, from a trace's device events, without the first rounds.

    Raises:
        RuntimeError: the rounds are not equal.
    """
    ordered = sorted(events, key=lambda event: float(event["ts"]))
    each = len(ordered) // rounds
    turns = [ordered[turn * each : (turn + 1) * each] for turn in range(_WARM, rounds)]
    names = {tuple(event["name"] for event in turn) for turn in turns}
    if len(ordered) != rounds * each or len(names) != 1:
        raise RuntimeError(f"{len(ordered)} launches are not {rounds} equal rounds")
    found = []
    for index in range(each):
        same = [turn[index] for turn in turns]
        before = [turn[index - 1] for turn in turns] if index else same
        idle = [
            max(0.0, now["ts"] - (last["ts"] + last["dur"])) if index else 0.0
            for now, last in zip(same, before, strict=True)
        ]
        found.append(
            {
                "name": same[0]["name"],
                "grid": same[0].get("args", {}).get("grid"),
                "us": round(statistics.median(float(event["dur"]) for event in same), 2),
                "idle_us": round(statistics.median(idle), 2),
            }
        )
    total = {key: round(sum(one[key] for one in found), 1) for key in ("us", "idle_us")}
    return {"launches": found, "total_us": total["us"], "idle_us": total["idle_us"]}

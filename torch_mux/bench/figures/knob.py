"""Throughput against p99 over ``max_bundle`` and ``max_wait``, from least latency to most throughput."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final

import torch_mux
from torch_mux.bench.figures.base import Finding, Row, ratio
from torch_mux.bench.figures.stage import Stage, configured
from torch_mux.bench.load import Traffic, finite

__all__ = ["measure", "rises"]

#: (max_bundle, max_wait in seconds), in the order in which latency gives way to throughput.
_SETTINGS: Final = ((1, 0.0), (4, 0.0), (16, 0.0), (64, 0.0), (64, 500e-6), (64, 2e-3))
_QUICK: Final = (_SETTINGS[0], _SETTINGS[2], _SETTINGS[-1])
_DEPTH: Final = 4
#: Of its own saturated throughput: what each setting, and the peer, is asked for.
_LOAD: Final = 0.8
#: By how much a point may fall behind its predecessor and still count as level.
_NOISE: Final = 0.05


def _point(stage: Stage, server: str) -> dict[str, Any]:
    """Saturated throughput, then p99 and device seconds a request of arrivals at a part of it."""
    clients = stage.rivals(server)
    traffics = [Traffic(one, depth=_DEPTH) for one in clients]
    saturated = stage.drive(traffics, 0.5 * stage.options.seconds, server=server).throughput()
    rate = _LOAD * saturated / len(clients)
    run = stage.drive(
        [Traffic(one, rate=rate) for one in clients],
        server=server,
        probe=lambda: torch_mux.stats().device_seconds,
    )
    before, after, _ = run.probes
    return {
        "saturated": saturated,
        "throughput": run.throughput(),
        "p99": finite(run.p99),
        "device": (after - before) / max(1, sum(got.served for got in run.clients)),
        "run": run.data(),
    }


def rises(values: Sequence[float | None]) -> float:
    """Percent of the steps from one value to the next that do not fall by more than noise."""
    steps = list(pairwise(values))
    good = sum(a is not None and b is not None and b >= (1 - _NOISE) * a for a, b in steps)
    return 100 * good / max(1, len(steps))


def measure(stage: Stage) -> Finding:
    """Each setting at the same part of its own throughput, and the peer likewise."""
    peer = stage.options.servers[0]
    stage.rivals(stage.mux.name)  # bundles of all sizes are captured before any setting forbids them
    points = []
    for most, wait in _SETTINGS if stage.options.steps > 4 else _QUICK:
        with configured(max_bundle=most, max_wait=wait):
            points.append({"max_bundle": most, "max_wait": wait, **_point(stage, stage.mux.name)})
    rival = {"server": peer, **_point(stage, peer)}
    del rival["device"]  # nothing of it went through mux
    columns = [[point[what] for point in points] for what in ("throughput", "p99")]
    least = min((one for one in columns[1] if one is not None), default=None)
    rows = (
        Row("steps of the curve that rise", min(map(rises, columns)), 100.0, False, "%"),
        Row(f"least p99 against {peer}", ratio(least, rival["p99"]), 1.0),
        Row(f"most throughput against {peer}", ratio(max(columns[0]), rival["throughput"]), 1.0, False, "x"),
    )
    return Finding(rows, {"load": _LOAD, "points": points, "peer": rival})

"""Throughput against p99 over ``max_bundle`` and ``max_wait``, from least latency to most throughput."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final

from torch_mux.bench.figures.base import Finding, Row, ratio
from torch_mux.bench.figures.stage import Stage, configured
from torch_mux.bench.load import Traffic, finite

__all__ = ["measure"]

#: (max_bundle, max_wait in seconds), in the order in which latency gives way to throughput.
_SETTINGS: Final = ((1, 0.0), (4, 0.0), (16, 0.0), (64, 0.0), (64, 500e-6), (64, 2e-3))
_QUICK: Final = (_SETTINGS[0], _SETTINGS[2], _SETTINGS[-1])
_DEPTH: Final = 4
#: Of the slowest contender's throughput: what all of them are asked for when p99 is measured.
_LOAD: Final = 0.5
#: By how much a point may fall behind its predecessor and still count as level.
_NOISE: Final = 0.05


def _throughput(stage: Stage, server: str) -> float:
    traffics = [Traffic(one, depth=_DEPTH) for one in stage.rivals(server)]
    return stage.drive(traffics, 0.5 * stage.options.seconds, server=server).throughput()


def _p99(stage: Stage, server: str, rate: float) -> float:
    clients = stage.rivals(server)
    return stage.drive([Traffic(one, rate=rate / len(clients)) for one in clients], server=server).p99


def rises(values: Sequence[float | None]) -> float:
    """Percent of the steps from one value to the next that do not fall by more than noise."""
    steps = list(pairwise(values))
    good = sum(a is not None and b is not None and b >= (1 - _NOISE) * a for a, b in steps)
    return 100 * good / max(1, len(steps))


def measure(stage: Stage) -> Finding:
    """Saturated throughput, and p99 at one rate that is light for all, at each setting and of the peer."""
    name, peer = stage.mux.name, stage.options.servers[0]
    stage.rivals(name)  # bundles of all sizes are captured before any setting forbids them
    settings = _SETTINGS if stage.options.steps > 4 else _QUICK
    points: list[dict[str, Any]] = []
    for most, wait in settings:
        with configured(max_bundle=most, max_wait=wait):
            points.append({"max_bundle": most, "max_wait": wait, "throughput": _throughput(stage, name)})
    rival: dict[str, Any] = {"server": peer, "throughput": _throughput(stage, peer)}
    rate = _LOAD * min(one["throughput"] for one in (*points, rival))
    for point in points:
        with configured(max_bundle=point["max_bundle"], max_wait=point["max_wait"]):
            point["p99"] = finite(_p99(stage, name, rate))
    rival["p99"] = finite(_p99(stage, peer, rate))
    least = min((one["p99"] for one in points if one["p99"] is not None), default=math.inf)
    most_served = max(one["throughput"] for one in points)
    rows = (
        Row("steps of the curve that rise", _monotone(points), 100.0, False, "%"),
        Row(f"least p99 against {peer}", ratio(least, rival["p99"]), 1.0),
        Row(f"most throughput against {peer}", ratio(most_served, rival["throughput"]), 1.0, False, "x"),
    )
    return Finding(rows, {"rate": rate, "points": points, "peer": rival})


def _monotone(points: Sequence[dict[str, Any]]) -> float:
    return min(rises([one[what] for one in points]) for what in ("throughput", "p99"))

"""The operator's two settings: throughput against p99 over ``max_bundle`` and over ``max_wait``.

*max_bundle* decides how long a bundle keeps the device from whoever comes next. So most tenants take all
they can get, in bundles as large as they may be, and a few ask for much less than their share: what all get
against the p99 of those few. For one crowd of equal clients it would be no choice: a bundle costs less a
request the larger it is, so the largest are best at both.

*max_wait* decides how many requests a bundle finds when the device is free. So all tenants ask for a part of
what the device can do: requests that it serves in a second at work against their p99.

Settings differ by a factor of two and begin where what is fixed in a bundle or a request no longer outweighs
what they change. A point is the median of rounds in which all settings and the peer take turns.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

import torch_mux
from torch_mux.bench.figures.base import Finding, Row, ratio
from torch_mux.bench.figures.stage import Stage, configured
from torch_mux.bench.load import Traffic, finite

__all__ = ["measure", "rises"]

#: In the order in which latency gives way to throughput; for short runs every other one.
_BUNDLES: Final = (8, 16, 32, 64)
_WAITS: Final = (0.0, 2e-3, 4e-3, 8e-3)
_ROUNDS: Final = 3
#: Of a run of other figures.
_LENGTH: Final = 0.5
#: One of so many tenants asks for little: this part of an equal share of the most there is.
_FEW: Final = 4
_LITTLE: Final = 0.08
#: Of the most there is: what all ask for over ``max_wait``, so that requests meet few others by themselves.
_LOAD: Final = 0.2
#: By how much a point may differ from its predecessor and still count as level.
_NOISE: Final = 0.05
#: Who serves, and under which settings.
_Setting = tuple[str, Mapping[str, float]]
_Measured = dict[str, Any]


def _crowded(stage: Stage, server: str) -> _Measured:
    """Requests of all a second, and p99 of the few, beside tenants that always have two bundles pending."""
    clients = stage.rivals(server)
    few = max(1, len(clients) // _FEW)
    depth = math.ceil(2 * _BUNDLES[-1] / (len(clients) - few))
    rate = _LITTLE * stage.most() / len(clients)
    traffics = [Traffic(one, rate=rate) for one in clients[:few]]
    traffics += [Traffic(one, depth=depth) for one in clients[few:]]
    run = stage.drive(traffics, _LENGTH * stage.options.seconds, server=server)
    return {"throughput": run.throughput(), "p99": run.quantile(0.99, range(few)), "run": run.data()}


def _part(stage: Stage, server: str) -> _Measured:
    """Requests a second of the device's at work, and p99, of arrivals at a part of the most there is."""
    clients = stage.rivals(server)
    traffics = [Traffic(one, rate=_LOAD * stage.most() / len(clients)) for one in clients]
    length = _LENGTH * stage.options.seconds
    run = stage.drive(traffics, length, server=server, probe=lambda: torch_mux.stats().device_seconds)
    before, after, _ = run.probes
    served = ratio(sum(got.served for got in run.clients), after - before)
    return {"throughput": served, "p99": run.p99, "run": run.data()}


def _curve(
    stage: Stage, settings: Sequence[Mapping[str, float]], measured: Callable[[Stage, str], _Measured]
) -> tuple[list[_Measured], _Measured]:
    """A point a setting, and the peer's; each the medians of rounds in which they take turns."""
    turns: list[_Setting] = [(stage.mux.name, setting) for setting in settings]
    turns.append((stage.options.servers[0], {}))
    rounds: list[list[_Measured]] = [[] for _ in turns]
    for _ in range(_ROUNDS if _thorough(stage) else 1):
        for (server, setting), found in zip(turns, rounds, strict=True):
            with configured(**setting):
                found.append(measured(stage, server))
    points = [
        {**setting, **_medians(found), "runs": [one["run"] for one in found]}
        for (_, setting), found in zip(turns, rounds, strict=True)
    ]
    return points[:-1], {"server": turns[-1][0], **points[-1]}


def _medians(found: Sequence[_Measured]) -> _Measured:
    medians: _Measured = {}
    for name in ("throughput", "p99"):
        values = [one[name] for one in found]
        medians[name] = None if None in values else finite(statistics.median(values))
    return medians


def _thorough(stage: Stage) -> bool:
    return stage.options.steps > 4


def rises(points: Sequence[_Measured]) -> float:
    """Percent of the steps in which throughput or p99 rises, and neither falls, by more than noise."""
    steps = list(pairwise(points))
    return 100 * sum(_rises(a, b) for a, b in steps) / max(1, len(steps))


def _rises(a: _Measured, b: _Measured) -> bool:
    grown = [ratio(b[name], a[name]) for name in ("throughput", "p99")]
    known = [one for one in grown if one is not None]
    return len(known) == len(grown) and min(known) >= 1 - _NOISE and max(known) > 1 + _NOISE


def _least(points: Sequence[_Measured]) -> float | None:
    return min((one["p99"] for one in points if one["p99"] is not None), default=None)


def measure(stage: Stage) -> Finding:
    """Both curves, each beside the peer under the same traffic."""
    stage.most()  # and bundles of all sizes are captured, before any setting forbids them
    every = 1 if _thorough(stage) else 2
    sizes = [{"max_bundle": most} for most in _BUNDLES[::every]]
    points, peer = _curve(stage, sizes, _crowded)
    waits, rival = _curve(stage, [{"max_wait": wait} for wait in _WAITS[::every]], _part)
    del rival["throughput"]  # nothing of it went through mux
    name = peer["server"]
    most = max((one["throughput"] for one in points if one["throughput"] is not None), default=None)
    rows = (
        Row("steps over max_bundle that rise", rises(points), 100.0, False, "%"),
        Row("steps over max_wait that rise", rises(waits), 100.0, False, "%"),
        Row(f"least p99 against {name}, beside busy tenants", ratio(_least(points), peer["p99"]), 1.0),
        Row(f"most throughput against {name}", ratio(most, peer["throughput"]), 1.0, False, "x"),
        Row(f"least p99 against {name}, at a part of the load", ratio(_least(waits), rival["p99"]), 1.0),
    )
    data = {"points": points, "peer": peer, "waits": {"points": waits, "peer": rival, "load": _LOAD}}
    return Finding(rows, data)

"""A latency tenant with a reserve beside tenants that take all they get, over pairs of architectures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any, Final

from torch_mux.bench.figures.base import Finding, Row, lateness, ratio
from torch_mux.bench.figures.stage import Stage
from torch_mux.bench.load import Client, Outcome, Traffic, finite

__all__ = ["measure"]

_RESERVE: Final = 0.25
#: Requests that each neighbour has under way all the time.
_DEPTH: Final = 4
#: Of a run: the 99th of a hundred needs some 460 requests (MLPerf's rule).
_LONGER: Final = 1.6
_FRONT: Final = "latency/front"


def _front(stage: Stage, workload: str, **quota: Any) -> Client:
    # One name throughout: a reserve stands until a request of that tenant brings another.
    client = stage.clients(workload, 1, "latency", first=stage.options.tenants - 1)[0]
    return Client(client.workload, client.index, client.inputs, {"tenant": _FRONT, **quota})


def _alone(stage: Stage, workload: str) -> dict[str, float]:
    """p99 in seconds within its quota with nothing lent, and with the whole GPU."""
    found = {}
    # What a reserve is without lending: a limit of the same size.
    for name, quota in (("same quota", {"sms": _RESERVE, "reserve": _RESERVE}), ("whole GPU", {})):
        client = _front(stage, workload, **quota)
        found[name] = _run(stage, client, ()).p99
    return found


def _run(stage: Stage, client: Client, others: Sequence[Client]) -> Outcome:
    busy = [Traffic(one, depth=_DEPTH) for one in others]
    return stage.drive([Traffic(client, rate=stage.options.rate), *busy], _LONGER * stage.options.seconds)


def _neighbours(stage: Stage, workload: str) -> list[Client]:
    return stage.clients(workload, max(1, stage.options.tenants - 1), f"latency/beside/{workload}")


def _pair(front: str, beside: str, run: Outcome, alone: Mapping[str, float], most: float) -> dict[str, Any]:
    if run.errors:
        raise RuntimeError(f"requests failed: {dict(run.errors)}")
    others = range(1, len(run.clients))
    kept = run.throughput(others)
    return {
        "front": front,
        "beside": beside,
        "p99": finite(run.quantile(0.99, [0])),
        "p50": finite(run.quantile(0.5, [0])),
        "alone": {name: finite(value) for name, value in alone.items()},
        "inflation": ratio(run.quantile(0.99, [0]), alone["same quota"]),
        "against whole GPU": ratio(run.quantile(0.99, [0]), alone["whole GPU"]),
        "neighbours": kept,
        "neighbours alone": most,
        "kept": ratio(kept, (1 - _RESERVE) * most),
        "run": run.data(),
    }


def measure(stage: Stage) -> Finding:
    """Six ordered pairs of three architectures."""
    models = stage.options.models[:3]
    alone = {name: _alone(stage, name) for name in models}
    most = {}
    for name in models:
        traffics = [Traffic(one, depth=_DEPTH) for one in _neighbours(stage, name)]
        most[name] = stage.drive(traffics, 0.7 * stage.options.seconds).throughput()
    runs = {}
    try:
        for a, b in permutations(models, 2):
            runs[a, b] = _run(stage, _front(stage, a, reserve=_RESERVE), _neighbours(stage, b))
    finally:
        # Gives the reserve back, which would stand for the figures that come.
        stage.drive([Traffic(_front(stage, models[0]), depth=1)], 0.05)

    pairs = [_pair(a, b, run, alone[a], most[b]) for (a, b), run in runs.items()]

    def column(name: str) -> list[float] | None:
        values = [pair[name] for pair in pairs]
        return None if not values or None in values else values

    inflation, whole, kept = (column(name) for name in ("inflation", "against whole GPU", "kept"))
    rows = (
        Row("p99 against same quota alone, mean", statistics.fmean(inflation) if inflation else None, 1.05),
        Row("p99 against same quota alone, worst", max(inflation) if inflation else None, 1.10),
        Row("p99 against alone on the whole GPU, worst", max(whole) if whole else None, 1.6),
        Row("neighbours' throughput of (1 - reserve), worst", min(kept) if kept else None, 0.9, most=False),
    )
    data = {"pairs": pairs, "rate": stage.options.rate, "reserve": _RESERVE}
    return Finding(rows, data, notes=lateness(runs.values()))

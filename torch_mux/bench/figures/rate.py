"""The highest total rate of arrivals whose p99 stays within the bound, for each server."""

from __future__ import annotations

from typing import Any

from torch_mux.bench.figures.base import Finding, Row, ratio
from torch_mux.bench.figures.stage import Stage

__all__ = ["measure"]


def _served(stage: Stage, name: str) -> dict[str, Any]:
    most, (best, runs) = stage.most(name), stage.sustained(name)
    return {"server": name, "closed loop": most, "rate": best, "runs": [one.data() for one in runs]}


def measure(stage: Stage) -> Finding:
    """All servers with the same arrivals; one that fails is told with its error, and the others go on."""
    found, errors = [], []
    for name in (stage.mux.name, *stage.options.servers):
        try:
            found.append(_served(stage, name))
        except Exception as error:
            words = f"{type(error).__name__}: {error}"
            found.append({"server": name, "failed": words})
            errors.append(f"{name}: {words}")
    ours, *peers = found
    best, limit = ours.get("rate"), f"p99 <= {stage.options.bound * 1e3:g} ms"
    rows = [
        Row(f"highest rate with {limit}", best, None, unit="req/s"),
        Row("against our closed-loop maximum", ratio(best, ours.get("closed loop")), 0.85, most=False),
    ]
    for index, peer in enumerate(peers):
        against = ratio(best, peer.get("rate"))
        rows.append(Row(f"against {peer['server']}", against, None if index else 2.5, most=False, unit="x"))
    return Finding(tuple(rows), {"servers": found}, tuple(errors))

"""The highest total rate of arrivals whose p99 stays within the bound, for each server."""

from __future__ import annotations

from typing import Any

from torch_mux.bench.figures.base import Finding, Row, ratio
from torch_mux.bench.figures.stage import Crowd, Stage

__all__ = ["measure", "measure_mix"]


def _served(stage: Stage, name: str, crowd: Crowd) -> dict[str, Any]:
    most, (best, runs) = stage.most(name, crowd), stage.sustained(name, crowd)
    return {"server": name, "closed loop": most, "rate": best, "runs": [one.data() for one in runs]}


def _compared(stage: Stage, crowd: Crowd, own: float | None, peer: float) -> Finding:
    """All servers with the same arrivals; one that fails is told with its error, and the others go on.

    Args:
        own: the least part of our closed-loop maximum, if that is a target.
        peer: how many times the rate of the peer to beat.
    """
    found, errors = [], []
    for name in (stage.mux.name, *stage.options.servers):
        try:
            found.append(_served(stage, name, crowd))
        except Exception as error:
            words = f"{type(error).__name__}: {error}"
            found.append({"server": name, "failed": words})
            errors.append(f"{name}: {words}")
    ours, *peers = found
    best, limit = ours.get("rate"), f"p99 <= {stage.bound(crowd) * 1e3:g} ms"
    rows = [
        Row(f"highest rate with {limit}", best, None, unit="req/s"),
        Row("against our closed-loop maximum", ratio(best, ours.get("closed loop")), own, most=False),
    ]
    for index, other in enumerate(peers):
        against = ratio(best, other.get("rate"))
        target = None if index else peer
        rows.append(Row(f"against {other['server']}", against, target, most=False, unit="x"))
    return Finding(tuple(rows), {"servers": found, "models": list(crowd)}, tuple(errors))


def measure(stage: Stage) -> Finding:
    """Every tenant has a model of one architecture."""
    return _compared(stage, stage.alone, 0.85, 2.5)


def measure_mix(stage: Stage) -> Finding:
    """As many models of each architecture, as many in sum, and twice the bound."""
    return _compared(stage, stage.options.models, None, 2.2)

"""Shares of the device: equal ones over architectures and staggered joins, and weighted ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch_mux
from torch_mux.bench.figures.base import Finding, Row, ratio
from torch_mux.bench.figures.stage import Stage, configured
from torch_mux.bench.load import Client, Traffic

__all__ = ["measure", "measure_weights"]

#: So small that every tenant has more pending than two bundles can hold: nobody ever runs dry.
_BUNDLE: Final = 8
_DEPTH: Final = 4 * _BUNDLE
_WEIGHTS: Final = (1, 2, 4, 8)


def device_seconds(tenants: Sequence[str]) -> Callable[[], dict[str, float]]:
    """A probe of what each of these tenants had of the device so far."""

    def probe() -> dict[str, float]:
        found = torch_mux.stats().tenants
        return {name: found[name].device_seconds if name in found else 0.0 for name in tenants}

    return probe


def _saturated(stage: Stage, clients: Sequence[Client], gap: float) -> dict[str, Any]:
    """Device seconds of each client in the window while all are busy; they join one after another."""
    names = [client.quota["tenant"] for client in clients]
    traffics = [Traffic(one, depth=_DEPTH, start=gap * number) for number, one in enumerate(clients)]
    seconds = stage.options.seconds
    with configured(max_bundle=_BUNDLE):
        run = stage.drive(traffics, seconds, gap * len(clients) + 0.3 * seconds, probe=device_seconds(names))
    before, after, _ = run.probes
    return {
        "tenants": names,
        "models": [client.workload for client in clients],
        "device seconds": [after[name] - before[name] for name in names],
        "requests": [got.served for got in run.clients],
        "run": run.data(),
    }


def measure(stage: Stage) -> Finding:
    """All architectures at once, equal weights: the fastest tenant against the slowest."""
    clients = [
        one for name in stage.options.models for one in stage.clients(name, stage.each, f"share/{name}")
    ]
    found = _saturated(stage, clients, 0.03 * stage.options.seconds)
    times = found["device seconds"]
    gap = ratio(max(times) - min(times), min(times))
    row = Row("fastest to slowest tenant by device time", None if gap is None else 100 * gap, 2.0, unit="%")
    return Finding((row,), found)


def _worst(found: Mapping[str, Any]) -> float | None:
    """Worst relative error of a share in percent."""
    times, whole = found["device seconds"], sum(found["device seconds"])
    parts = [
        ratio(time, whole * weight / sum(_WEIGHTS)) for time, weight in zip(times, _WEIGHTS, strict=True)
    ]
    return max((100 * abs(part - 1) for part in parts if part is not None), default=None)


def measure_weights(stage: Stage) -> Finding:
    """Weights 1, 2, 4 and 8 over models of one architecture, and over one of each."""
    one = stage.clients(stage.main, len(_WEIGHTS), "weight/one")
    each = [stage.clients(name, 1, f"weight/each/{name}")[0] for name in stage.options.models]
    rows, data = [], {}
    for kind, clients in (("one architecture", one), ("an architecture each", each)):
        weighted = [
            Client(client.workload, client.index, client.inputs, {**client.quota, "weight": weight})
            for client, weight in zip(clients, _WEIGHTS, strict=True)
        ]
        found = data[kind] = _saturated(stage, weighted, 0.0)
        rows.append(Row(f"worst error of a share, {kind}", _worst(found), 5.0, unit="%"))
    return Finding(tuple(rows), {"weights": list(_WEIGHTS), **data})

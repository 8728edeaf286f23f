"""Shares of the device: equal ones over architectures and staggered joins, and weighted ones.

What is shared is device time, so the device must be what everybody waits for. Requests of one sample are so
short that a host's Python is full first, and shares of an idle device say little: here each request has
``Options.samples`` of them, and a run in which the device rests is void.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch_mux
from torch_mux.bench.figures.base import Finding, Row, ratio
from torch_mux.bench.figures.stage import Stage, configured
from torch_mux.bench.load import Client, Traffic

__all__ = ["BUNDLE", "measure", "measure_weights"]

#: So small that every tenant has more pending than two bundles can hold: nobody ever runs dry.
BUNDLE: Final = 8
#: Of a run of other figures: shares are as exact as a bundle is short against the time that a tenant has.
_LONGER: Final = 3.0
_DEPTH: Final = 4 * BUNDLE
_WEIGHTS: Final = (1, 2, 4, 8)
#: Part of the time that a device is at work which counts as saturated.
_BUSY: Final = 0.9


class Used(NamedTuple):
    """What each tenant had of the device so far, and the device in all, at a moment; seconds."""

    tenants: dict[str, float]
    device: float
    moment: float


def device_seconds(tenants: Sequence[str]) -> Callable[[], Used]:
    """A probe of what each of these tenants had of the device so far."""

    def probe() -> Used:
        said, moment = torch_mux.stats(), time.perf_counter()
        found = said.tenants
        times = {name: found[name].device_seconds if name in found else 0.0 for name in tenants}
        return Used(times, said.device_seconds, moment)

    return probe


def _clients(stage: Stage, workload: str, count: int, prefix: str) -> list[Client]:
    """Clients with requests of several samples, of which nothing larger than these bundles is captured."""
    heavy = stage.heavy(workload)
    with configured(max_bundle=BUNDLE) if heavy != workload else contextlib.nullcontext():
        return stage.clients(heavy, count, prefix)


def _saturated(stage: Stage, clients: Sequence[Client], gap: float) -> dict[str, Any]:
    """Device seconds of each client in the window while all are busy; they join one after another."""
    names = [client.quota["tenant"] for client in clients]
    traffics = [Traffic(one, depth=_DEPTH, start=gap * number) for number, one in enumerate(clients)]
    seconds = stage.options.seconds
    lead = gap * len(clients) + 0.3 * seconds
    with configured(max_bundle=BUNDLE):
        run = stage.drive(traffics, _LONGER * seconds, lead, probe=device_seconds(names))
    before, after, _ = run.probes
    return {
        "tenants": names,
        "models": [client.workload for client in clients],
        "device seconds": [after.tenants[name] - before.tenants[name] for name in names],
        "samples": stage.options.samples,
        "busy": (after.device - before.device) / (after.moment - before.moment),
        "requests": [got.served for got in run.clients],
        "run": run.data(),
    }


def measure(stage: Stage) -> Finding:
    """All architectures at once, equal weights: the fastest tenant against the slowest."""
    clients = [
        one for name in stage.options.models for one in _clients(stage, name, stage.each, f"share/{name}")
    ]
    found = _saturated(stage, clients, 0.03 * stage.options.seconds)
    times = found["device seconds"]
    gap = ratio(max(times) - min(times), min(times))
    percent = None if gap is None else 100 * gap
    row = Row("fastest to slowest tenant by device time", percent, 2.0, unit="%", void=_idle(found))
    return Finding((row, _busy("shares", found)), found)


def _idle(found: Mapping[str, Any]) -> str:
    """Why shares were not those of a saturated device, if so."""
    return "" if found["busy"] >= _BUSY else "not saturated"


def _busy(name: str, found: Mapping[str, Any]) -> Row:
    asked = f"requests of {found['samples']}"
    return Row(f"device at work, {name}, {asked}", 100 * found["busy"], None, unit="%")


def _worst(found: Mapping[str, Any]) -> float | None:
    """Worst relative error of a share in percent."""
    times, whole = found["device seconds"], sum(found["device seconds"])
    parts = [
        ratio(time, whole * weight / sum(_WEIGHTS)) for time, weight in zip(times, _WEIGHTS, strict=True)
    ]
    return max((100 * abs(part - 1) for part in parts if part is not None), default=None)


def measure_weights(stage: Stage) -> Finding:
    """Weights 1, 2, 4 and 8 over models of one architecture, and over one of each."""
    one = _clients(stage, stage.main, len(_WEIGHTS), "weight/one")
    each = [_clients(stage, name, 1, f"weight/each/{name}")[0] for name in stage.options.models]
    rows, data = [], {}
    for kind, clients in (("one architecture", one), ("an architecture each", each)):
        weighted = [
            Client(client.workload, client.index, client.inputs, {**client.quota, "weight": weight})
            for client, weight in zip(clients, _WEIGHTS, strict=True)
        ]
        found = data[kind] = _saturated(stage, weighted, 0.0)
        rows.append(Row(f"worst error of a share, {kind}", _worst(found), 5.0, unit="%", void=_idle(found)))
        rows.append(_busy(kind, found))
    return Finding(tuple(rows), {"weights": list(_WEIGHTS), **data})

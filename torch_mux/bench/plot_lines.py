"""Lines from a record of ``bench models``: rounds against the number of tenants, latency against caps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from torch_mux.bench.plot_paper import Chart, Series

__all__ = ["charts"]

_OURS: Final = "torch-mux gather"
_PEERS: Final = 4  # the best ones; more lines cannot be told apart
_FEWEST: Final = 3  # points that make a line

Point = tuple[float, float, float, float]


def charts(report: dict[str, Any]) -> list[Chart]:
    """The panels that a record has enough points for."""
    found = []
    for model in dict.fromkeys(record["model"] for record in report["results"]):
        records = [each for each in report["results"] if each["model"] == model and "pipelined_us" in each]
        measures = {
            each["measure"]: each
            for each in report.get("measures", ())
            if each["model"] == model and "failed" not in each
        }
        found += _rounds(model, records, measures.get("floor"))
        found += _caps(model, measures.get("caps"))
    return found


def _rounds(model: str, records: Sequence[dict[str, Any]], floor: dict[str, Any] | None) -> list[Chart]:
    """Ours, the peers that are best at the largest number of tenants, and what the device cannot beat."""
    lines: dict[str, list[Point]] = {}
    for record in sorted(records, key=lambda each: int(each["tenants"])):
        times = record["pipelined_us"]
        point = (float(record["tenants"]), times["median"], times["low"], times["high"])
        lines.setdefault(record["contender"], []).append(point)
    lines = {name: points for name, points in lines.items() if len(points) >= _FEWEST}
    if not lines:
        return []
    peers = sorted(
        (name for name in lines if name != _OURS), key=lambda name: (-lines[name][-1][0], lines[name][-1][1])
    )
    chosen = [name for name in (_OURS, *peers[:_PEERS]) if name in lines]
    series = [Series(name, tuple(lines[name])) for name in chosen]
    if floor is not None:
        values = {int(count): float(each["floor_us"]) for count, each in floor["floors"].items()}
        points = tuple((float(count), value, value, value) for count, value in sorted(values.items()))
        series.append(Series("floor: weights once through memory, FLOPs, 1 µs a level", points))
    return [Chart(f"{model}: one request of each", "tenants", "µs a round, pipelined", tuple(series))]


def _caps(model: str, measure: dict[str, Any] | None) -> list[Chart]:
    """Only where caps are enforced."""
    if measure is None or not measure["enforced"]:
        return []
    series = tuple(
        Series(
            f"{count} tenant{'' if int(count) == 1 else 's'}",
            tuple(
                (float(cap), times["median"], times["low"], times["high"])
                for cap, times in sorted(by_cap.items(), key=lambda item: float(item[0]))
            ),
        )
        for count, by_cap in sorted(measure["latency_us"].items(), key=lambda item: int(item[0]))
    )
    return [Chart(f"{model}: latency against cap", "share of the GPU (sms)", "µs, synchronised", series)]

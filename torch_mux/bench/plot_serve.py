"""The plots of a serving record: ``python -m torch_mux.bench.plot_serve docs/benchmarks/serve-h100.json``.

Draws beside the record what ``python -m torch_mux.bench.serve`` measured: p99 over the rate of arrivals for
each server, the throughput and p99 that the settings trade for each other, shares of the device, what a
latency tenant notices of its neighbours, and how predictions of bundles are distributed. A figure that is not
in the record, or failed there, is left out.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from torch_mux.bench.figures.base import cells
from torch_mux.bench.load import quantile
from torch_mux.bench.plot import fill
from torch_mux.bench.plot_paper import Chart, Series, drawing

__all__ = ["charts", "draw", "main", "markdown", "svg"]

_PARTS: Final = (1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99)


def _series(name: str, points: Iterable[tuple[float, float | None]]) -> Series:
    """A line through the points that have a value above 0."""
    return Series(name, tuple((x, y, y, y) for x, y in points if y and x > 0))


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def _rate(data: Mapping[str, Any]) -> Chart:
    series = []
    for server in data["servers"]:
        points = [(run["offered"], _ms(run["quantiles"]["p99"])) for run in server.get("runs", ())]
        series.append(_series(server["server"], sorted(points, key=lambda point: point[0])))
    models = data.get("models", ())
    about = f", {len(models)} architectures" if len(models) > 1 else ""
    return Chart(f"p99 over the rate of arrivals{about}", "requests/s", "ms", tuple(series))


def _traded(name: str, points: Sequence[Mapping[str, Any]]) -> Series:
    return _series(name, [(one["throughput"] or 0.0, _ms(one["p99"])) for one in points])


def _sizes(data: Mapping[str, Any]) -> Chart:
    series = _traded("max_bundle", data["points"]), _traded(data["peer"]["server"], [data["peer"]])
    return Chart("Most throughput, and p99 of who asks for little", "requests/s", "p99, ms", series)


def _waits(data: Mapping[str, Any]) -> Chart:
    found = data.get("waits", {"points": (), "load": 0.0})
    title = f"max_wait at {found['load']:.0%} of the most there is"
    series = (_traded("max_wait", found["points"]),)
    return Chart(title, "requests/s of the device at work", "p99, ms", series)


def _shares(data: Mapping[str, Any]) -> Chart:
    times = data["device seconds"]
    mean = sum(times) / len(times)
    groups: dict[str, list[tuple[float, float | None]]] = {}
    for number, (model, time) in enumerate(zip(data["models"], times, strict=True), 1):
        groups.setdefault(model, []).append((number, time / mean if mean else None))
    series = tuple(_series(model, points) for model, points in groups.items())
    return Chart("Equal weights: share of the device of the mean", "tenant", "of the mean", series)


def _weights(data: Mapping[str, Any]) -> Chart:
    weights, series = data["weights"], []
    for kind, found in data.items():
        if kind == "weights":
            continue
        times = found["device seconds"]
        unit = sum(times) / sum(weights)
        both = zip(weights, times, strict=True)
        series.append(_series(kind, [(one, time / (unit * one) if unit else None) for one, time in both]))
    return Chart("Weights: share of the device of the one granted", "weight", "of granted", tuple(series))


def _latency(data: Mapping[str, Any]) -> Chart:
    pairs = list(enumerate(data["pairs"], 1))
    kinds = {"p99 of the same quota alone": "inflation", "p99 of the whole GPU": "against whole GPU"}
    kinds["neighbours' throughput of (1 - reserve)"] = "kept"
    series = tuple(_series(name, [(n, pair[key]) for n, pair in pairs]) for name, key in kinds.items())
    return Chart("Latency tenant beside busy ones", "pair of architectures", "ratio", series)


def _prediction(data: Mapping[str, Any]) -> Chart:
    series = []
    for kind in ("held out", "seen"):
        pairs = data.get(kind, {}).get("pairs", ())
        ratios = sorted(measured / predicted for predicted, measured in pairs if predicted)
        parts = _PARTS if ratios else ()
        series.append(_series(kind, [(part, quantile(ratios, part / 100)) for part in parts]))
    return Chart("Measured over predicted time of a bundle", "percentile", "ratio", tuple(series))


_CHARTS: Final[Sequence[tuple[str, Callable[[Mapping[str, Any]], Chart]]]] = (
    ("rate", _rate),
    ("mix", _rate),
    ("knob", _sizes),
    ("knob", _waits),
    ("shares", _shares),
    ("weights", _weights),
    ("latency", _latency),
    ("prediction", _prediction),
)


def charts(report: Mapping[str, Any]) -> list[Chart]:
    """The panels that a record has points for."""
    figures = report["figures"]
    found = [draw(figures[name]["data"]) for name, draw in _CHARTS if "data" in figures.get(name, ())]
    return [
        Chart(one.title, one.across, one.up, tuple(line for line in one.series if line.points))
        for one in found
        if any(line.points for line in one.series)
    ]


def svg(report: Mapping[str, Any]) -> str:
    """All panels of a record."""
    return drawing(charts(report), report["environment"])


def draw(report: Mapping[str, Any], record: Path) -> Path | None:
    """Writes the plots of a record beside it and tells where; None where it has no points."""
    if not charts(report):
        return None
    figure = record.with_suffix(".svg")
    figure.write_text(svg(report))
    return figure


def markdown(report: Mapping[str, Any]) -> str:
    """The table of target and measurement; what failed says so."""
    lines = ["| figure | what | target | measured | |", "|---|---|---|---|---|"]
    for name, found in report["figures"].items():
        rows = [cells(name, row) for row in found.get("rows", ())]
        if "failed" in found:
            rows.append((name, found["failed"].splitlines()[0], "", "", "FAILED"))
        lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


def _block(report: Mapping[str, Any], figure: Path, record: Path, folder: Path) -> str:
    """What stands between the marks of a page in ``folder``."""
    plots, source = (Path(os.path.relpath(path.resolve(), folder)).as_posix() for path in (figure, record))
    facts = report["environment"]
    commit = (facts["commit"] or "unknown")[:12]
    versions = f"torch {facts['torch']}, triton {facts['triton']}, commit {commit}"
    about = f"{facts['device']}, {versions}. From [{source}]({source}): `{facts['command']}`."
    return f"![Serving figures]({plots})\n\n{markdown(report)}\n\n{about}"


def main(argv: Sequence[str] | None = None) -> None:
    """Draws the plots beside the record and, on demand, fills a page's block."""
    flags = argparse.ArgumentParser(prog="python -m torch_mux.bench.plot_serve", description=__doc__)
    flags.add_argument("record", type=Path, help="what python -m torch_mux.bench.serve --json wrote")
    flags.add_argument("--page", type=Path, default=None, help="a file with the two marks")
    arguments = flags.parse_args(argv)
    report = json.loads(arguments.record.read_text())
    figure = draw(report, arguments.record)
    if figure is None:
        flags.error(f"{arguments.record} has no points to draw")
    print(figure)
    if arguments.page is not None:
        block = _block(report, figure, arguments.record, arguments.page.resolve().parent)
        arguments.page.write_text(fill(arguments.page.read_text(), block))


if __name__ == "__main__":
    main()

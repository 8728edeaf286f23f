"""The figures of a paper record: ``python -m torch_mux.bench.plot_paper docs/benchmarks/paper-h100.json``.

Draws beside the record what ``python -m torch_mux.bench.paper`` measured: how many times faster one coalesced
launch is than each peer, over the number of tenants R; latency of one product over the multiprocessors of its
cap; and eight products one after another, side by side under caps, and coalesced.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

__all__ = ["Chart", "Series", "charts", "drawing", "main", "svg"]

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _KEY = 430, 270, 52, 40, 30, 14
#: Pixels that a label on the axis across may need.
_LABEL = 28
_COLOURS = ("#d9480f", "#1971c2", "#2f9e44", "#9c36b5", "#868e96", "#e8590c")


@dataclass(frozen=True)
class Series:
    """A line: points (x, y, lowest y, highest y) in order of x."""

    name: str
    points: tuple[tuple[float, float, float, float], ...]


@dataclass(frozen=True)
class Chart:
    """One panel; both axes are logarithmic."""

    title: str
    across: str
    up: str
    series: tuple[Series, ...]


def _times(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {row["contender"]: row["microseconds"] for row in result["rows"] if "microseconds" in row}


def _title(case: dict[str, Any]) -> str:
    return f"{case['name']}, {case['precision']}"


def _coalescing(results: Sequence[dict[str, Any]]) -> list[Chart]:
    groups: dict[str, dict[str, list[tuple[float, float, float, float]]]] = {}
    for result in results:
        times = _times(result)
        ours = times.get("coalesced")
        for name, spent in times.items():
            if ours is None or name == "coalesced":
                continue
            ratios = [spent[which] / ours["median"] for which in ("median", "low", "high")]
            group = groups.setdefault(_title(result["case"]), {})
            group.setdefault(name, []).append((result["tenants"], *ratios))
    return [
        Chart(title, "tenants R", "times coalesced", tuple(Series(n, tuple(p)) for n, p in group.items()))
        for title, group in groups.items()
    ]


def _blocks(results: Sequence[dict[str, Any]]) -> list[Chart]:
    series = tuple(
        Series(
            result["case"]["name"],
            tuple((float(cap), t["median"], t["low"], t["high"]) for cap, t in _times(result).items()),
        )
        for result in results
    )
    return [Chart("Latency of one product, float16", "multiprocessors", "µs", series)] if series else []


def _together(results: Sequence[dict[str, Any]]) -> list[Chart]:
    found = []
    for result in results:
        times, series = _times(result), []
        capped = {name: t for name, t in times.items() if name.startswith("branches of ")}
        caps = [float(name.rsplit(" ", 1)[1]) for name in capped]
        for name in ("serial", "coalesced"):
            if name in times and caps:
                t = times[name]
                line = tuple((cap, t["median"], t["low"], t["high"]) for cap in caps)
                series.append(Series(name, line))
        points = zip(caps, capped.values(), strict=True)
        branches = tuple((cap, t["median"], t["low"], t["high"]) for cap, t in points)
        series.append(Series("capped, side by side", branches))
        title = f"{result['tenants']} of {_title(result['case'])}"
        found.append(Chart(title, "multiprocessors of each", "µs a round", tuple(series)))
    return found


def charts(report: dict[str, Any]) -> list[Chart]:
    """The panels of a record."""
    by: dict[str, list[dict[str, Any]]] = {}
    for result in report["results"]:
        by.setdefault(result["figure"], []).append(result)
    return [
        *_coalescing(by.get("coalescing", ())),
        *_blocks(by.get("blocks", ())),
        *_together(by.get("together", ())),
    ]


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten within the range; few ones where that is many, else even ones."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    inside = [value for value in found if low / 1.01 <= value <= high * 1.01]
    if len(inside) < 2:
        return [float(f"{low + (high - low) * part / 5:.3g}") for part in range(1, 5)]
    return inside if len(inside) <= 7 else [value for value in inside if f"{value:.0e}".startswith("1")]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = math.log(high / low) or 1.0
    return lambda value: start + math.log(value / low) / span * (end - start)


def _apart(values: Sequence[float], place: Callable[[float], float]) -> list[float]:
    """Those of ascending values whose labels do not run into the one before."""
    found: list[float] = []
    for value in values:
        if not found or place(value) - place(found[-1]) >= _LABEL:
            found.append(value)
    return found


def _text(x: float, y: float, content: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}"{style}>{escape(content)}</text>'


def _panel(chart: Chart, left: float, top: float) -> list[str]:
    points = [point for series in chart.series for point in series.points]
    xs, ys = [p[0] for p in points], [value for p in points for value in p[1:]]
    floor, ceiling = min(ys) / 1.1, max(ys) * 1.1
    bottom, right = top + _HEIGHT - _BOTTOM - _KEY * len(chart.series), left + _WIDTH - 24
    x, y = _scale(min(xs), max(xs), left + _LEFT, right), _scale(floor, ceiling, bottom, top + _TOP)
    parts = [_text(left + 8, top + 16, chart.title, ' font-weight="bold"')]
    for value in _ticks(floor, ceiling):
        ends = f'x1="{left + _LEFT}" x2="{right}" y1="{y(value):.1f}" y2="{y(value):.1f}"'
        parts.append(f'<line {ends} stroke="#dee2e6"/>')
        parts.append(_text(left + _LEFT - 6, y(value) + 4, f"{value:g}", ' text-anchor="end"'))
    for value in _apart(sorted(set(xs)) if len(set(xs)) <= 9 else _ticks(min(xs), max(xs)), x):
        parts.append(_text(x(value), bottom + 15, f"{float(f'{value:.4g}'):g}", ' text-anchor="middle"'))
    parts.append(_text(right, bottom + 30, f"{chart.across} →", ' text-anchor="end"'))
    parts.append(_text(left + 8, top + _TOP - 2, chart.up, ' fill="#495057" font-size="11"'))
    for index, series in enumerate(chart.series):
        colour = _COLOURS[index % len(_COLOURS)]
        path = " ".join(f"{x(p[0]):.1f},{y(p[1]):.1f}" for p in series.points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for p in series.points:
            ends = f'y1="{y(p[2]):.1f}" y2="{y(p[3]):.1f}"'
            parts.append(f'<line x1="{x(p[0]):.1f}" x2="{x(p[0]):.1f}" {ends} stroke="{colour}"/>')
            parts.append(f'<circle cx="{x(p[0]):.1f}" cy="{y(p[1]):.1f}" r="2.5" fill="{colour}"/>')
        line = bottom + 30 + _KEY * index
        parts.append(f'<rect x="{left + _LEFT}" y="{line - 9:.1f}" width="12" height="4" fill="{colour}"/>')
        parts.append(_text(left + _LEFT + 18, line - 3, series.name, ' font-size="11"'))
    return parts


def svg(report: dict[str, Any]) -> str:
    """The panels of a record."""
    return drawing(charts(report), report["environment"])


def drawing(found: Sequence[Chart], facts: dict[str, Any]) -> str:
    """All panels, two in a row, with the device and the versions below."""
    parts: list[str] = []
    for index, chart in enumerate(found):
        parts += _panel(chart, _WIDTH * (index % 2), (_HEIGHT + 16) * (index // 2))
    height = (_HEIGHT + 16) * -(-len(found) // 2) + 24
    versions = f"torch {facts['torch']}, triton {facts['triton']}, commit {(facts.get('commit') or '?')[:12]}"
    parts.append(_text(8, height - 8, f"{facts['device']}, {versions}", ' font-size="11" fill="#495057"'))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * _WIDTH}" height="{height}" '
        f'viewBox="0 0 {2 * _WIDTH} {height}" font-family="sans-serif" font-size="12">'
    )
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>"]) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Draws the figure beside the record."""
    flags = argparse.ArgumentParser(prog="python -m torch_mux.bench.plot_paper", description=__doc__)
    flags.add_argument("record", type=Path, help="what python -m torch_mux.bench.paper --json wrote")
    record = flags.parse_args(argv).record
    figure = record.with_suffix(".svg")
    figure.write_text(svg(json.loads(record.read_text())))
    print(figure)


if __name__ == "__main__":
    main()

"""A picture of a timeline: ``python -m torch_mux.bench.plot_trace trace.json --until 20``.

Reads what ``torch_mux.trace`` or ``torch-mux trace`` wrote and draws it beside: a row a lane with its
bundles, a row a tenant with its requests, light from the arrival and dark while their bundle is at work. For
more than a few milliseconds open the file at https://ui.perfetto.dev instead. No plotting package is needed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from xml.sax.saxutils import escape

__all__ = ["Slice", "main", "slices", "svg"]

_WIDTH, _LABELS, _RIGHT, _ROW, _BAR = 1040, 130, 30, 20, 14
_COLOURS: Final = ("#1c7ed6", "#d9480f", "#2b8a3e", "#862e9c", "#5c940d", "#c2255c", "#0b7285", "#e67700")
_MIXED: Final = "#495057"
_CHARACTER: Final = 5.6  # pixels of one at the size of labels


@dataclass(frozen=True)
class Slice:
    """A part of a row.

    Attributes:
        row: a lane or a tenant.
        name: what it shows.
        start, end: milliseconds since the first arrival.
        waits: a request before its bundle is at work.
        lane: it is a bundle.
    """

    row: str
    name: str
    start: float
    end: float
    waits: bool = False
    lane: bool = False


def slices(trace: Mapping[str, Any]) -> list[Slice]:
    """What a timeline shows, lanes before tenants."""
    events = trace["traceEvents"]
    names = {
        (event["pid"], event.get("tid")): str(event["args"]["name"]) for event in events if event["ph"] == "M"
    }
    timed = [event for event in events if event["ph"] != "M"]
    if not timed:
        return []
    zero = min(event["ts"] for event in timed)

    def place(event: Mapping[str, Any]) -> str:
        return names[event["pid"], event["tid"]]

    def since(moment: float) -> float:
        return float(moment - zero) / 1e3

    found = [
        Slice(place(one), one["name"], since(one["ts"]), since(one["ts"] + one["dur"]), lane=True)
        for one in timed
        if one["ph"] == "X"
    ]
    ends = {(one["id"], one["name"]): one["ts"] for one in timed if one["ph"] == "e"}
    inside = "in its bundle"
    began = {one["id"]: one["ts"] for one in timed if one["ph"] == "b" and one["name"] == inside}
    for one in timed:
        if one["ph"] == "b" and one["name"] != inside:
            start = max(one["ts"], began[one["id"]])
            row, name = place(one), one["name"]
            found.append(Slice(row, name, since(one["ts"]), since(start), waits=True))
            found.append(Slice(row, name, since(start), since(ends[one["id"], name])))
    return sorted(found, key=lambda one: (not one.lane, one.row, one.start))


def svg(trace: Mapping[str, Any], start: float = 0.0, until: float | None = None) -> str:
    """The part of a timeline between two moments, in milliseconds since the first arrival."""
    every = slices(trace)
    last = max((one.end for one in every), default=0.0) if until is None else until
    shown = [one for one in every if one.end > start and one.start < last]
    rows = list(dict.fromkeys(one.row for one in shown))
    programs = list(dict.fromkeys(one.name for one in every if not one.lane))
    colours = {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(sorted(programs))}
    scale = (_WIDTH - _LABELS - _RIGHT) / max(last - start, 1e-9)
    bottom = 10 + _ROW * len(rows)
    parts = [_row(row, 10 + _ROW * number) for number, row in enumerate(rows)]
    for one in shown:
        left = _LABELS + scale * (max(one.start, start) - start)
        width = scale * (min(one.end, last) - max(one.start, start))
        parts += _bar(one, left, width, 10.0 + _ROW * rows.index(one.row), colours)
    parts += _axis(start, last, scale, bottom)
    parts += _legend(colours, bottom + 40)
    about = ", ".join(f"{key} {value}" for key, value in trace.get("otherData", {}).items())
    parts.append(f'<text x="{_LABELS}" y="{bottom + 62}" fill="{_MIXED}">{escape(about)}</text>')
    height = bottom + 72
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" font-size="11">'
    )
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>"]) + "\n"


def _row(name: str, top: float) -> str:
    line = (
        f'<line x1="{_LABELS}" y1="{top + _ROW}" x2="{_WIDTH - _RIGHT}" y2="{top + _ROW}" stroke="#f1f3f5"/>'
    )
    return line + f'<text x="{_LABELS - 8}" y="{top + 12}" text-anchor="end">{escape(name)}</text>'


def _bar(one: Slice, left: float, width: float, top: float, colours: Mapping[str, str]) -> list[str]:
    """A bundle is named where its name fits; one of several programs is grey."""
    program = one.name.rpartition(" x")[0] if one.lane else one.name
    colour = colours.get(program, _MIXED)
    faint = ' fill-opacity="0.25"' if one.waits else ""
    about = f"<title>{escape(one.name)}: {one.end - one.start:.2f} ms</title>"
    place = f'x="{left:.1f}" y="{top:.0f}" width="{max(width, 0.5):.1f}" height="{_BAR}"'
    found = [f'<rect {place} fill="{colour}"{faint} stroke="white" stroke-width="0.5">{about}</rect>']
    if one.lane and _CHARACTER * len(one.name) < width:
        found.append(f'<text x="{left + 3:.1f}" y="{top + 11:.0f}" fill="white">{escape(one.name)}</text>')
    return found


def _axis(start: float, last: float, scale: float, bottom: float) -> list[str]:
    step = next(
        one for one in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 1 << 40) if (last - start) / one <= 12
    )
    first = int(-(-start // step))
    return [
        f'<text x="{_LABELS + scale * (number * step - start):.1f}" y="{bottom + 16}" text-anchor="middle" '
        f'fill="{_MIXED}">{number * step} ms</text>'
        for number in range(first, int(last // step) + 1)
    ]


def _legend(colours: Mapping[str, str], top: float) -> list[str]:
    found, left = [], float(_LABELS)
    for name, colour in (*colours.items(), ("several as one", _MIXED)):
        found.append(f'<rect x="{left:.0f}" y="{top - 9}" width="10" height="10" fill="{colour}"/>')
        found.append(f'<text x="{left + 14:.0f}" y="{top}">{escape(name)}</text>')
        left += 30 + 6.2 * len(name)
    found.append(f'<text x="{left:.0f}" y="{top}">light: from arrival until its bundle is at work</text>')
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Draws the picture beside the timeline."""
    flags = argparse.ArgumentParser(prog="python -m torch_mux.bench.plot_trace", description=__doc__)
    flags.add_argument("trace", type=Path, help="what torch_mux.trace wrote")
    flags.add_argument("--start", type=float, default=0.0, help="milliseconds after the first arrival")
    flags.add_argument("--until", type=float, default=None, help="milliseconds after the first arrival")
    arguments = flags.parse_args(argv)
    trace = json.loads(arguments.trace.read_text())
    if not slices(trace):
        flags.error(f"{arguments.trace} has no bundles to draw")
    figure = arguments.trace.with_suffix(".svg")
    figure.write_text(svg(trace, arguments.start, arguments.until))
    print(figure)


if __name__ == "__main__":
    main()

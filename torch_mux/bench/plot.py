"""The figure and the table of a record: ``python -m torch_mux.bench.plot docs/benchmarks/models-h100.json``.

Reads what ``python -m torch_mux.bench.models --json`` wrote, draws the figure beside it, and another one of
lines where there is something to draw (:mod:`torch_mux.bench.plot_lines`). With ``--readme`` it writes figure
and table between the two marks that the file must hold. No plotting package is needed.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from torch_mux.bench.plot_lines import charts
from torch_mux.bench.plot_paper import drawing

__all__ = ["BEGIN", "END", "fill", "main", "markdown", "svg"]

BEGIN, END = "<!-- benchmark: begin -->", "<!-- benchmark: end -->"

OURS = "torch-mux"
#: Contenders that answer something else, and are no peers.
REFERENCE = "for reference: "
_WIDTH, _LABELS, _VALUES = 1040, 440, 160
_BAR, _GAP, _PANEL = 18, 6, 34
_WORDS = 84  # of an error, so that they fit beside the names


def _throughput(record: dict[str, Any], which: str = "median") -> float:
    """Requests a second of pipelined rounds; ``which`` of the times a round."""
    return float(record["tenants"] / record["pipelined_us"][which] * 1e6)


def _timed(record: dict[str, Any]) -> bool:
    return "pipelined_us" in record


def _untimed(record: dict[str, Any]) -> str:
    """Why a contender has no times: it failed, or the run ended before its turn."""
    failed = record.get("failed")
    return f"failed: {failed.splitlines()[0]}"[:_WORDS] if failed else "not timed"


def _panels(report: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Records by (model, tenants), in the order in which they were measured."""
    panels: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in report["results"]:
        panels.setdefault((record["model"], record["tenants"]), []).append(record)
    return list(panels.values())


def _text(x: float, y: float, content: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}"{style}>{escape(content)}</text>'


def _bar(record: dict[str, Any], y: float, scale: float) -> list[str]:
    """One contender: its name, its bar with the spread of the repetitions, its number, or why not."""
    ours = record["contender"].startswith(OURS)
    middle = y + _BAR / 2
    if not _timed(record):
        name = _text(_LABELS - 10, middle + 4, record["contender"], ' text-anchor="end"')
        return [name, _text(_LABELS, middle + 4, _untimed(record), ' fill="#495057"')]
    ends = [_LABELS + scale * _throughput(record, which) for which in ("high", "low", "median")]
    colour = "#d9480f" if ours else "#868e96"
    number = f"{_throughput(record):,.0f} requests/s"
    weight = ' font-weight="bold"' if ours else ""
    return [
        _text(_LABELS - 10, middle + 4, record["contender"], f' text-anchor="end"{weight}'),
        f'<rect x="{_LABELS}" y="{y:.1f}" width="{ends[2] - _LABELS:.1f}" height="{_BAR}" fill="{colour}"/>',
        f'<line x1="{ends[0]:.1f}" y1="{middle:.1f}" x2="{ends[1]:.1f}" y2="{middle:.1f}" stroke="#212529"/>',
        _text(max(ends) + 8, middle + 4, number, weight),
    ]


def svg(report: dict[str, Any]) -> str:
    """Requests a second, one panel a model and number of tenants; bars of one panel share a scale."""
    parts: list[str] = []
    y = 30.0
    for records in _panels(report):
        if not any(map(_timed, records)):
            continue
        first = records[0]
        title = f"{first['model']}, {first['tenants']} tenant{'s' * (first['tenants'] > 1)}"
        parts.append(_text(10, y + 10, title, ' font-weight="bold"'))
        y += _PANEL - 10
        scale = (_WIDTH - _LABELS - _VALUES) / max(
            _throughput(record, "low") for record in records if _timed(record)
        )
        for record in records:
            parts += _bar(record, y, scale)
            y += _BAR + _GAP
        y += _PANEL - 18
    parts.append(_text(10, y + 8, _facts(report), ' font-size="11" fill="#495057"'))
    height = y + 20
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height:.0f}" '
        f'viewBox="0 0 {_WIDTH} {height:.0f}" font-family="sans-serif" font-size="13">'
    )
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>"]) + "\n"


def _facts(report: dict[str, Any]) -> str:
    facts, options = report["environment"], report["options"]
    commit = (facts.get("commit") or "unknown")[:12]
    precision = options["dtype"].removeprefix("torch.")
    versions = f"torch {facts['torch']}, triton {facts['triton']}, commit {commit}"
    return f"{facts['device']}, {precision}, {versions}"


def markdown(report: dict[str, Any]) -> str:
    """The best peer and ours for each model and number of tenants; times are medians over repetitions.

    Where no peer was timed, all of them say why.
    """
    lines = [
        "| model | tenants | contender | pipelined round, µs | synchronised round, µs | error (l2) |",
        "|---|---|---|---|---|---|",
    ]
    for records in _panels(report):
        for record in _best(records):
            times = [
                _spread(record[kind]) if _timed(record) else _untimed(record)
                for kind in ("pipelined_us", "synchronised_us")
            ]
            error = record.get("error")
            cells = (
                record["model"],
                str(record["tenants"]),
                record["contender"],
                *times,
                f"{error['mean']:.1e}" if error else "-",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _best(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ours = [record for record in records if record["contender"].startswith(OURS)]
    peers = [record for record in records if record not in ours]
    timed = [each for each in peers if _timed(each) and not each["contender"].startswith(REFERENCE)]
    best = min(timed, key=lambda each: float(each["pipelined_us"]["median"]), default=None)
    return [*(peers if best is None else [best]), *ours]


def _spread(times: dict[str, float]) -> str:
    return f"{times['median']:.0f} ({times['low']:.0f}-{times['high']:.0f})"


def fill(text: str, block: str) -> str:
    """``text`` with ``block`` between its two marks.

    Raises:
        ValueError: the marks are missing, repeated or in the wrong order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise ValueError(f"write the lines {BEGIN} and {END} once each where the benchmark belongs")
    return f"{before}{BEGIN}\n\n{block}\n\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the figure beside the record and, on demand, fill a README's block."""
    flags = argparse.ArgumentParser(prog="python -m torch_mux.bench.plot", description=__doc__)
    flags.add_argument("record", type=Path, help="what python -m torch_mux.bench.models --json wrote")
    flags.add_argument("--readme", type=Path, default=None, help="a file with the two marks")
    arguments = flags.parse_args(argv)
    report = json.loads(arguments.record.read_text())
    figure = arguments.record.with_suffix(".svg")
    figure.write_text(svg(report))
    print(figure)
    lines = charts(report)
    if lines:
        further = figure.with_name(f"{figure.stem}-lines.svg")
        further.write_text(drawing(lines, report["environment"]))
        print(further)
    if arguments.readme is not None:
        folder = arguments.readme.resolve().parent
        links = [Path(os.path.relpath(path.resolve(), folder)) for path in (figure, arguments.record)]
        block = f"![Requests a second]({links[0].as_posix()})\n\n{markdown(report)}\n\n"
        block += f"{_facts(report)}. The whole record: [{links[1].as_posix()}]({links[1].as_posix()})."
        arguments.readme.write_text(fill(arguments.readme.read_text(), block))
        print(arguments.readme)


if __name__ == "__main__":
    main()

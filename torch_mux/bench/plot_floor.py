"""How near each operation comes to its floor: ``python -m torch_mux.bench.plot_floor NAME.json``.

Reads a record of ``python -m torch_mux.bench.kernels``, takes for every layer the tile that the chooser
takes, and divides its floor (:mod:`torch_mux.bench.floor`) by its time: 1 is the limit of the machine. Draws
beside the record and prints the table.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from torch_mux.bench import measure, table
from torch_mux.bench.floor import layer_floor

__all__ = ["Achieved", "achieved", "main", "svg"]

_WIDTH, _LABELS, _VALUES, _BAR, _STEP = 860, 250, 170, 14, 20


@dataclass(frozen=True)
class Achieved:
    """One layer shape: microseconds it takes and could not take less of."""

    model: str
    layer: str
    count: int
    microseconds: float
    floor: float

    @property
    def fraction(self) -> float:
        """Of the limit: at most 1, unless what it reads is in the cache already."""
        return self.floor / self.microseconds


def achieved(content: dict[str, Any], tenants: int) -> list[Achieved]:
    """The layers of a record at that many tenants, in its order."""
    sms, own = content["environment"]["multiprocessors"], table.table_of(content)
    device = content["environment"]["device"]
    return [
        Achieved(
            each.layer.model,
            each.layer.name,
            each.layer.count,
            each.microseconds[table.chosen(each, sms, own)],
            1e6 * layer_floor(each.layer, each.slots, device),
        )
        for each in table.read(content)
        if each.slots == tenants
    ]


def svg(content: dict[str, Any], tenants: int) -> str:
    """A bar a layer, as long as its fraction of the floor."""
    found = achieved(content, tenants)
    scale = _WIDTH - _LABELS - _VALUES
    parts, y = [], 34.0
    title = f"Achieved fraction of the floor by operation, {tenants} tenants"
    parts.append(f'<text x="10" y="20" font-weight="bold">{escape(title)}</text>')
    for each in found:
        width, middle = scale * min(each.fraction, 1.0), y + _BAR - 2
        name = escape(f"{each.model} {each.layer}")
        words = f"{each.fraction:.2f}: {each.floor:.1f} of {each.microseconds:.1f} µs"
        parts += [
            f'<text x="{_LABELS - 8}" y="{middle:.1f}" text-anchor="end">{name}</text>',
            f'<rect x="{_LABELS}" y="{y:.1f}" width="{width:.1f}" height="{_BAR}" fill="#d9480f"/>',
            f'<text x="{_LABELS + width + 6:.1f}" y="{middle:.1f}">{escape(words)}</text>',
        ]
        y += _STEP
    end = f'x1="{_LABELS + scale}" x2="{_LABELS + scale}" y1="30" y2="{y:.0f}"'
    parts.append(f'<line {end} stroke="#868e96"/>')
    facts = content["environment"]
    words = f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, commit {facts['commit']}"
    parts.append(f'<text x="10" y="{y + 14:.0f}" font-size="11" fill="#495057">{escape(words)}</text>')
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y + 24:.0f}" '
        f'viewBox="0 0 {_WIDTH} {y + 24:.0f}" font-family="sans-serif" font-size="12">'
    )
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>"]) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Draws the figure beside the record and prints its numbers."""
    flags = argparse.ArgumentParser(prog="python -m torch_mux.bench.plot_floor", description=__doc__)
    flags.add_argument("record", type=Path, help="what python -m torch_mux.bench.kernels --json wrote")
    flags.add_argument("--tenants", type=int, default=16)
    options = flags.parse_args(argv)
    content = measure.read(flags, options.record)
    found = achieved(content, options.tenants)
    if not found:
        known = sorted({each.slots for each in table.read(content)})
        flags.error(f"the record has no layers of {options.tenants} tenants; it has {known}")
    figure = options.record.with_name(f"{options.record.stem}-floor.svg")
    figure.write_text(svg(content, options.tenants))
    rows = [
        (each.model, each.layer, f"{each.microseconds:.1f}", f"{each.floor:.1f}", f"{each.fraction:.2f}")
        for each in found
    ]
    print("\n".join(measure.aligned([("model", "layer", "µs", "floor µs", "fraction"), *rows])))
    print(figure)


if __name__ == "__main__":
    main()

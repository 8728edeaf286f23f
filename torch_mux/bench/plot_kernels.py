"""The figure of a kernel record: ``python -m torch_mux.bench.plot_kernels docs/benchmarks/NAME.json``.

For every model it adds up its convolutions and GEMMs: one coalesced launch a layer with the tile that the
chooser takes, against cuBLAS and cuDNN once a tenant. Only the layers are in it, nothing between them. Draws
beside the record and, with ``--readme``, writes figure and table between the marks of
:mod:`torch_mux.bench.plot`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from torch_mux.bench import table
from torch_mux.bench.plot import fill

__all__ = ["Total", "main", "markdown", "svg", "totals"]

_NAMES = {"resnet50": "ResNet-50", "bert": "BERT-base, 128 tokens", "vit": "ViT-B/16"}
_WIDTH, _LABELS, _VALUES, _BAR = 860, 330, 110, 18


@dataclass(frozen=True)
class Total:
    """All layers of one model: microseconds for one inference of every tenant."""

    model: str
    tenants: int
    vendor: float
    coalesced: float


def totals(content: dict[str, Any], tenants: int = 16) -> list[Total]:
    """The models of a record at that many tenants, in its order."""
    sms = content["environment"]["multiprocessors"]
    vendor: dict[str, float] = {}
    for result in content["results"]:
        if result["slots"] == tenants:
            layer = result["layer"]
            spent = layer["count"] * result["vendor_microseconds"]
            vendor[layer["model"]] = vendor.get(layer["model"], 0.0) + spent
    own = table.table_of(content)  # later records may know of tiles that this one has not timed
    ours: dict[str, float] = {}
    for each in table.read(content):
        if each.slots == tenants:
            spent = each.layer.count * each.microseconds[table.chosen(each, sms, own)]
            ours[each.layer.model] = ours.get(each.layer.model, 0.0) + spent
    return [Total(model, tenants, vendor[model], ours[model]) for model in vendor if model in _NAMES]


def _row(label: str, y: float, value: float, scale: float, colour: str) -> list[str]:
    width, middle = value * scale, y + _BAR / 2 + 4
    return [
        f'<text x="{_LABELS - 10}" y="{middle:.1f}" text-anchor="end">{escape(label)}</text>',
        f'<rect x="{_LABELS}" y="{y:.1f}" width="{width:.1f}" height="{_BAR}" fill="{colour}"/>',
        f'<text x="{_LABELS + width + 8:.1f}" y="{middle:.1f}">{value:,.0f} µs</text>',
    ]


def _facts(content: dict[str, Any]) -> str:
    facts = content["environment"]
    versions = f"torch {facts['torch']}, triton {facts['triton']}"
    return f"{facts['device']}, float16, batch 1 a tenant, {versions}, commit {facts['commit']}"


def svg(content: dict[str, Any]) -> str:
    """Two bars a model on one scale; shorter is better."""
    found = totals(content)
    scale = (_WIDTH - _LABELS - _VALUES) / max(max(total.vendor, total.coalesced) for total in found)
    parts, y = [], 12.0
    for total in found:
        title = f"{_NAMES[total.model]}, {total.tenants} tenants"
        parts.append(f'<text x="10" y="{y + 12:.1f}" font-weight="bold">{escape(title)}</text>')
        parts += _row("cuBLAS and cuDNN, one after another", y + 20, total.vendor, scale, "#868e96")
        parts += _row("one coalesced launch a layer", y + 44, total.coalesced, scale, "#d9480f")
        y += 78
    parts.append(
        f'<text x="10" y="{y + 6:.1f}" font-size="11" fill="#495057">{escape(_facts(content))}</text>'
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y + 18:.0f}" '
        f'viewBox="0 0 {_WIDTH} {y + 18:.0f}" font-family="sans-serif" font-size="13">'
    )
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>"]) + "\n"


def markdown(content: dict[str, Any]) -> str:
    """The table, one line a model."""
    lines = [
        "| layers of | tenants | one after another, µs | coalesced, µs | ratio |",
        "|---|---|---|---|---|",
    ]
    for total in totals(content):
        ratio = total.vendor / total.coalesced
        numbers = f"{total.vendor:,.0f} | {total.coalesced:,.0f} | {ratio:.1f}"
        lines.append(f"| {_NAMES[total.model]} | {total.tenants} | {numbers} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the figure, print the table, and fill a page's block if asked to."""
    parser = argparse.ArgumentParser(prog="python -m torch_mux.bench.plot_kernels", description=__doc__)
    parser.add_argument("json", type=Path, help="what the kernel benchmark wrote")
    parser.add_argument("--readme", type=Path, help="a file with the two marks")
    options = parser.parse_args(argv)
    content = json.loads(options.json.read_text())
    figure = options.json.with_suffix(".svg")
    figure.write_text(svg(content))
    if options.readme is not None:
        link = Path(os.path.relpath(figure.resolve(), options.readme.resolve().parent)).as_posix()
        block = (
            f"![convolutions and GEMMs of 16 models]({link})\n\n{markdown(content)}\n\n{_facts(content)}. "
        )
        block += f"From `{options.json}`: `{content['environment']['command']}`."
        options.readme.write_text(fill(options.readme.read_text(), block))
    print(markdown(content))


if __name__ == "__main__":
    main()

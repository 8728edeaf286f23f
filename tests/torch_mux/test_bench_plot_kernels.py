"""The committed kernel figure and the README's table are what the committed record says."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from torch_mux.bench import plot_kernels

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "docs" / "benchmarks" / "kernels-h100.json"


def test_figure_and_table_follow_the_record() -> None:
    content = json.loads(RECORD.read_text())
    figure = plot_kernels.svg(content)
    assert RECORD.with_suffix(".svg").read_text() == figure
    assert plot_kernels.markdown(content) in (ROOT / "docs" / "design" / "kernels.md").read_text()
    ElementTree.fromstring(figure)


def test_totals_add_up_every_layer() -> None:
    content = json.loads(RECORD.read_text())
    found = {total.model: total for total in plot_kernels.totals(content)}
    assert set(found) == {"resnet50", "bert", "vit"}
    one = [r for r in content["results"] if r["slots"] == 16 and r["layer"]["model"] == "bert"]
    vendor = sum(r["layer"]["count"] * r["vendor_microseconds"] for r in one)
    assert found["bert"].vendor == pytest.approx(vendor)
    assert all(0 < total.coalesced < total.vendor for total in found.values())

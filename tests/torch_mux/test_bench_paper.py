"""The papers' experiments: what needs no GPU, and a short run of everything on one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from torch_mux.bench import paper, plot_paper


def _result(figure: str, tenants: int, **medians: float) -> dict[str, Any]:
    rows = [
        {"contender": name, "microseconds": {"median": value, "low": value, "high": value}}
        for name, value in medians.items()
    ]
    case = {"name": "a product", "m": 1, "n": 1, "k": 1, "precision": "float16"}
    return {"figure": figure, "case": case, "tenants": tenants, "rows": rows}


def test_geometric_means_are_of_two_and_more_tenants() -> None:
    report = {
        "results": [
            _result("coalescing", 1, serial=100.0, coalesced=1.0),
            _result("coalescing", 2, serial=8.0, coalesced=2.0),
            _result("coalescing", 4, serial=36.0, coalesced=4.0),
        ]
    }
    assert "serial 6.00" in paper.summary(report).splitlines()[-1]
    assert math.isnan(paper.geometric_mean([]))


def test_a_failed_contender_is_in_the_text() -> None:
    result = _result("coalescing", 2, coalesced=2.0)
    result["rows"].append({"contender": "serial", "error": "RuntimeError: broken"})
    assert "serial FAILED: RuntimeError: broken" in paper.summary({"results": [result]})


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where no GPU is")
def test_no_gpu_is_said_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        paper.main([])
    assert caught.value.code == 2
    assert "need a CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
def test_every_contender_is_right(tmp_path: Path) -> None:
    record = tmp_path / "paper.json"
    assert paper.main(["--json", str(record), "--tenants", "1,3", "--replays", "2"]) == 0
    figures = {result["figure"] for result in json.loads(record.read_text())["results"]}
    assert figures == {"coalescing", "blocks", "together"}


def test_the_figure_holds_every_panel(tmp_path: Path) -> None:
    results = [_result("coalescing", count, serial=8.0 * count, coalesced=2.0) for count in (1, 2, 4)]
    results.append(_result("blocks", 1, **{"1": 90.0, "8": 20.0, "132": 9.0}))
    results.append(_result("together", 8, **{"serial": 24.0, "coalesced": 5.0, "branches of 66": 8.0}))
    facts = {"device": "a <GPU>", "torch": "2", "triton": "3", "commit": None}
    record = tmp_path / "paper.json"
    record.write_text(json.dumps({"environment": facts, "results": results}))
    plot_paper.main([str(record)])
    drawn = record.with_suffix(".svg").read_text()
    ElementTree.fromstring(drawn)
    assert "a &lt;GPU&gt;" in drawn
    assert drawn.count("<polyline") == 1 + 1 + 3
    ratios = next(chart for chart in plot_paper.charts({"results": results})).series[0]
    assert [point[:2] for point in ratios.points] == [(1, 4.0), (2, 8.0), (4, 16.0)]

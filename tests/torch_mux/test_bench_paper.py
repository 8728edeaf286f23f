"""The papers' experiments: what needs no GPU, and a short run of everything on one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from torch_mux.bench import paper


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

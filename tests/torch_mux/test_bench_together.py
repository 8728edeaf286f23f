"""The row of constrained kernels: its layers, a short run on the CPU, and the arithmetic of its table."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from torch_mux.bench import layer_ways, together
from torch_mux.bench.layer_ways import GpuWays
from torch_mux.bench.layers import DISTINCT, Layer
from torch_mux.bench.together_table import table


def test_layers_add_up_to_the_models() -> None:
    flops = {
        model: sum(layer.flops * layer.count for layer in DISTINCT if layer.model == model) / 1e9
        for model in ("resnet50", "vit", "bert", "mobilenet")
    }
    assert 8.1 < flops["resnet50"] < 8.3 and 33 < flops["vit"] < 35
    assert 21 < flops["bert"] < 22.5 and 0.42 < flops["mobilenet"] < 0.45
    mobile = [layer for layer in DISTINCT if layer.model == "mobilenet"]
    assert sum(layer.count for layer in mobile) == 64
    assert sum(layer.count for layer in mobile if layer.depthwise) == 15
    assert len({(layer.m, layer.n, layer.k, layer.conv, layer.activation) for layer in mobile}) == len(mobile)
    assert not any(layer.depthwise for layer in DISTINCT if layer.model != "mobilenet")


def test_a_short_run_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "together.json"
    words = "squeeze 120-32,3x3 each of 200,resnet50 fc,1x1 40-120"
    flags = ["--device", "cpu", "--slots", "2,3", "--replays", "1", "--layers", words]
    assert together.main([*flags, "--json", str(record)]) == 0
    report = json.loads(record.read_text())
    assert len(report["results"]) == 8 and {"commit", "command", "torch"} <= set(report["environment"])
    for result in report["results"]:
        assert [row["kind"] for row in result["rows"]] == ["serial", "together", "coalesced"]
        assert all(row["microseconds"]["median"] > 0 and row["l2_error"] < 1e-5 for row in result["rows"])
    said = capsys.readouterr()
    assert "on a CPU" in said.out and "4 of 4" in said.out and "MISS" not in said.out
    assert "mobilenet squeeze 120-32" in said.err, "each layer is told when it is done"


def test_what_the_budget_does_not_reach_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert together.main(["--device", "cpu", "--slots", "2", "--budget", "1e-6"]) == 0
    assert "not measured: the budget of 1e-06 s was spent" in capsys.readouterr().out


def test_a_wrong_way_is_a_row_with_its_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(self: Any, index: int) -> list[Tensor]:
        return [self.data.vendor(index, 0) for _ in range(self.data.slots)]  # the first's weights for all

    monkeypatch.setattr(layer_ways.CpuWays, "_batched", wrong)
    flags = ["--device", "cpu", "--slots", "2", "--replays", "1", "--layers", "squeeze 120-32"]
    assert together.main(flags) == 1
    out = capsys.readouterr().out
    assert "coalesced FAILED: WrongResults: relative l2 error" in out and "together, a core each" in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--slots", "1"], "must be from 2 to 16"),
        (["--slots", "four"], "takes numbers"),
        (["--layers", "nothing"], "no layer for cpu contains 'nothing'"),
        (["--replays", "0"], "must be at least 1"),
    ],
)
def test_wrong_words_are_told(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        together.main(["--device", "cpu", *flags])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def result(model: str, slots: int, **times: float) -> dict[str, Any]:
    kinds = {
        "vendor": "serial",
        "own": "serial",
        "narrow": "together",
        "wide": "together",
        "one": "coalesced",
    }
    rows = [
        {
            "contender": name,
            "kind": kinds.get(name, "together"),
            "microseconds": {"median": time, "low": time, "high": time},
        }
        for name, time in times.items()
    ]
    return {"layer": asdict(Layer(model, "layer", 1, 1, 1, 1)), "slots": slots, "rows": rows}


def test_means_are_of_the_best_against_the_faster_serial_way() -> None:
    facts = {"device": "a GPU", "torch": "2", "triton": "3", "commit": None}
    results = [
        result("a", 4, vendor=80.0, own=40.0, narrow=10.0, wide=20.0, one=5.0),  # 4 and 8 times
        result("b", 4, vendor=18.0, own=36.0, narrow=12.0, wide=2.0, one=9.0),  # 9 and 2 times
        {**result("b", 4), "skipped": "late"},
        {**result("a", 4), "rows": [{"contender": "own", "kind": "serial", "error": "ValueError: no"}]},
    ]
    text = table({"environment": facts, "options": {"device": "cuda"}, "results": results})
    total = next(line for line in text.splitlines() if " all " in line)
    assert "2 of 4" in total and "6.00x (>= 2.6: pass)" in total and "4.00x (>= 4.0: pass)" in total
    assert "times faster than own: vendor" in text and "narrow 3.46" in text
    assert "own FAILED: ValueError: no" in text and "1 of 4 not measured: late" in text


def test_caps_are_even_shares_of_the_device() -> None:
    ways = object.__new__(GpuWays)
    ways._sms = 132
    ways.data = type("Slots", (), {"slots": 16})()
    assert ways.caps() == [9, 17, 33]
    ways.data.slots = 4
    assert ways.caps() == [33, 66], "all of the device is no cap"


@pytest.mark.gpu
def test_layers_of_all_models_on_a_gpu(tmp_path: Path) -> None:
    record = tmp_path / "together.json"
    words = "1x1 64-64 @56,3x3 512 @7,bert 768-768,vit classes,3x3 each of 200,squeeze 120-32"
    flags = ["--slots", "2,4", "--replays", "2", "--layers", words, "--budget", "200"]
    assert together.main([*flags, "--json", str(record)]) == 0
    results = json.loads(record.read_text())["results"]
    assert len(results) == 12
    for found in results:
        kinds = {row["kind"] for row in found["rows"] if "microseconds" in row}
        assert kinds == {"serial", "together", "coalesced"}

"""The figure and the README's table come from a record alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from torch_mux.bench import plot, plot_floor, plot_lines

ROOT = Path(__file__).resolve().parents[2]
NAMES = {"inductor, one after another": 800.0, "torch-mux gather": 200.0}


@pytest.fixture
def report() -> dict[str, Any]:
    results = [
        {
            "model": model,
            "contender": name,
            "tenants": 16,
            "error": {"mean": 1e-3, "worst": 2e-3, "answers": 16.0},
            "pipelined_us": {"median": micros, "low": micros - 20, "high": micros + 20},
            "synchronised_us": {"median": micros + 100, "low": micros + 90, "high": micros + 110},
        }
        for model in ("resnet50", "a <b> & c")
        for name, micros in NAMES.items()
    ]
    facts = {"device": "Device", "torch": "2.13.0", "triton": "3.6.0", "commit": "0123456789abcdef"}
    return {"environment": facts, "options": {"dtype": "torch.float16"}, "results": results}


def test_bars_are_as_long_as_the_throughput(report: dict[str, Any]) -> None:
    root = ElementTree.fromstring(plot.svg(report))
    space = "{http://www.w3.org/2000/svg}"
    bars = [float(bar.get("width", "")) for bar in root.iter(f"{space}rect") if bar.get("width") != "100%"]
    assert len(bars) == 4
    assert bars[1] / bars[0] == pytest.approx(4, rel=0.01)
    texts = [text.text for text in root.iter(f"{space}text")]
    assert "80,000 requests/s" in texts and "20,000 requests/s" in texts
    assert "a <b> & c, 16 tenants" in texts
    assert "Device, float16, torch 2.13.0, triton 3.6.0, commit 0123456789ab" in texts
    height = float(root.get("height", ""))
    assert all(float(text.get("y", "")) < height for text in root.iter(f"{space}text"))


def test_the_command_fills_the_block_again_and_again(report: dict[str, Any], tmp_path: Path) -> None:
    record, readme = tmp_path / "docs" / "models.json", tmp_path / "README.md"
    record.parent.mkdir()
    record.write_text(json.dumps(report))
    readme.write_text(f"before\n\n{plot.BEGIN}\nold\n{plot.END}\n\nafter\n")
    for _ in range(2):
        plot.main([str(record), "--readme", str(readme)])
    text = readme.read_text()
    assert record.with_suffix(".svg").read_text() == plot.svg(report)
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert text.count("![Requests a second](docs/models.svg)") == 1
    assert "| resnet50 | 16 | torch-mux gather | 200 (180-220) | 300 (290-310) | 1.0e-03 |" in text


@pytest.mark.parametrize(
    "text", ["", plot.BEGIN, plot.END + plot.BEGIN, 2 * (plot.BEGIN + plot.END)], ids=str
)
def test_a_file_without_the_marks_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="once each"):
        plot.fill(text, "block")


def test_the_readme_has_the_marks() -> None:
    assert "block" in plot.fill((ROOT / "README.md").read_text(), "block")


def test_what_was_not_timed_is_said_and_not_drawn(report: dict[str, Any]) -> None:
    first, _, third, fourth = report["results"]
    del first["pipelined_us"], first["synchronised_us"], first["error"]
    first["failed"] = "OutOfMemoryError: no memory\nand more"
    for record in (third, fourth):
        del record["pipelined_us"], record["synchronised_us"]
    drawn = plot.svg(report)
    ElementTree.fromstring(drawn)
    assert "failed: OutOfMemoryError: no memory" in drawn
    assert "a &lt;b&gt;" not in drawn  # a panel in which nothing was timed
    rows = plot.markdown(report).splitlines()[2:]
    assert rows[0].count("failed: OutOfMemoryError: no memory") == 2
    assert rows[1].count("not timed") == 0
    assert rows[2].count("not timed") == rows[3].count("not timed") == 2


def test_the_table_has_the_best_peer_and_ours(report: dict[str, Any]) -> None:
    first = report["results"][0]
    quick = {"median": 100.0, "low": 90.0, "high": 110.0}
    for name, times in (
        ("forked", {"median": 700.0, "low": 690.0, "high": 710.0}),
        (f"{plot.REFERENCE}one shared model", quick),
    ):
        report["results"].append({**first, "contender": name, "pipelined_us": times})
    report["results"].append({**first, "contender": "wrong", "failed": "WrongAnswers: far off"})
    del report["results"][-1]["pipelined_us"]
    rows = [row.split(" | ")[2] for row in plot.markdown(report).splitlines()[2:] if "resnet50" in row]
    assert rows == ["forked", "torch-mux gather"]
    assert "far off" in plot.svg(report)


def lines_of(report: dict[str, Any]) -> dict[str, list[tuple[str, int]]]:
    charts = plot_lines.charts(json.loads(json.dumps(report)))
    return {chart.title: [(line.name, len(line.points)) for line in chart.series] for chart in charts}


def test_lines_are_drawn_of_what_was_measured_often_enough(report: dict[str, Any], tmp_path: Path) -> None:
    assert lines_of(report) == {}
    times = {"median": 10.0, "low": 9.0, "high": 11.0}
    report["results"] = [
        {
            "model": "bert",
            "contender": name,
            "tenants": count,
            "pipelined_us": {**times, "median": 10.0 + place},
        }
        for place, name in enumerate(["a", "b", "c", "d", "e", "torch-mux gather"])
        for count in (4, 1, 16)
    ]
    floors = {count: {"floor_us": 5.0 * count} for count in (1, 4, 16)}
    caps = {16: {0.5: times, 1.0: times}, 1: {0.5: times, 1.0: times}}
    report["measures"] = [
        {"model": "bert", "measure": "floor", "floors": floors},
        {"model": "bert", "measure": "caps", "enforced": True, "latency_us": caps},
        {"model": "bert", "measure": "clients", "failed": "TimeoutError: late"},
    ]
    found = lines_of(report)
    rounds, latency = found.values()
    names = [name for name, _ in rounds]
    assert names[:5] == ["torch-mux gather", "a", "b", "c", "d"] and names[5].startswith("floor")
    assert {points for _, points in rounds} == {3}
    assert latency == [("1 tenant", 2), ("16 tenants", 2)]
    report["measures"][1]["enforced"] = False
    assert list(lines_of(report)) == ["bert: one request of each"]
    for record in report["results"]:
        record["synchronised_us"] = times
    path = tmp_path / "models.json"
    path.write_text(json.dumps(report))
    plot.main([str(path)])
    ElementTree.parse(tmp_path / "models-lines.svg")


def test_the_kept_figure_of_floors_follows_its_record() -> None:
    record = ROOT / "docs" / "benchmarks" / "kernels-h100.json"
    content = json.loads(record.read_text())
    figure = plot_floor.svg(content, 16)
    assert record.with_name("kernels-h100-floor.svg").read_text() == figure
    ElementTree.fromstring(figure)
    found = plot_floor.achieved(content, 16)
    assert all(0 < each.fraction < 1.05 for each in found) and len(found) > 30


def test_a_record_without_such_layers_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    record = ROOT / "docs" / "benchmarks" / "kernels-h100.json"
    with pytest.raises(SystemExit):
        plot_floor.main([str(record), "--tenants", "5"])
    assert "has no layers of 5 tenants; it has [1, 16]" in capsys.readouterr().err

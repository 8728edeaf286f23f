"""The picture of a timeline: what is in it, and that the guide's is drawn from the record beside it."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import torch_mux
from torch_mux.bench import plot_trace
from torch_mux.bench.plot_trace import slices

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "docs" / "examples" / "sixteen-cpu.json"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Two tenants with a model each, five rounds."""
    path = tmp_path / "trace.json"
    models = [torch.compile(nn.Linear(8, 8).eval(), backend="mux") for _ in range(2)]
    x = torch.randn(2, 8)
    with torch.inference_mode():
        torch_mux.gather(*((model, x) for model in models))
        with torch_mux.trace(path):
            for _ in range(5):
                for tenant, model in zip(("alice", "<bob>"), models, strict=True):
                    with torch_mux.quota(tenant):
                        torch_mux.submit(model, x).result()
    return path


def test_rows_are_lanes_then_tenants_and_nobody_is_left_out(trace: Path) -> None:
    content = json.loads(trace.read_text())
    assert content["otherData"]["on"] == "cpu" and content["otherData"]["torch"] == torch.__version__
    found = slices(content)
    assert list(dict.fromkeys(one.row for one in found)) == ["lane 0", "<bob>", "alice"]
    bundles = [one for one in found if one.lane]
    assert sum(one.waits for one in found) == 10 and 5 <= len(bundles) <= 10
    for one in found:
        assert 0.0 <= one.start <= one.end
        if not one.lane and not one.waits:
            assert any(
                abs(one.start - bundle.start) < 1e-2 and abs(one.end - bundle.end) < 1e-2
                for bundle in bundles
            )
    figure = plot_trace.svg(content)
    ElementTree.fromstring(figure)
    assert "&lt;bob&gt;" in figure and "Linear x1" in figure


def test_a_part_of_it_shows_what_falls_into_it() -> None:
    content = json.loads(RECORD.read_text())
    every = slices(content)
    for start, last in ((0.0, 1e9), (20.0, 50.0), (33.0, 33.1)):
        shown = [one for one in every if one.end > start and one.start < last]
        assert plot_trace.svg(content, start, last).count("<title>") == len(shown)


def test_the_command_draws_beside_the_record_and_refuses_an_empty_one(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot_trace.main([str(trace)])
    assert capsys.readouterr().out.strip() == str(trace.with_suffix(".svg"))
    assert trace.with_suffix(".svg").read_text() == plot_trace.svg(json.loads(trace.read_text()))
    empty = tmp_path / "empty.json"
    empty.write_text('{"traceEvents": []}')
    with pytest.raises(SystemExit):
        plot_trace.main([str(empty)])


def test_the_picture_in_the_guide_follows_its_record() -> None:
    content = json.loads(RECORD.read_text())
    assert RECORD.with_suffix(".svg").read_text() == plot_trace.svg(content, 0.0, 50.0)
    tenants = {one.row for one in slices(content) if not one.lane}
    assert len(tenants) == 16
    assert any(" + " in one.name for one in slices(content) if one.lane), "several architectures as one"

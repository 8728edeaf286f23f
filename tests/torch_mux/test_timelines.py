"""Timelines, profiler ranges and the ``trace`` command: who was served when, in which bundle."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile

import torch_mux

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).relu()


def _serve(rounds: int, device: str = "cpu") -> list[Any]:
    models = [torch.compile(Net().eval().to(device), backend="mux") for _ in range(3)]
    x = torch.randn(2, 8, device=device)
    with torch.inference_mode():
        torch_mux.gather(*((model, x) for model in models))
        for _ in range(rounds):
            futures = []
            for tenant, model in zip(("alice", "bob", "carol"), models, strict=True):
                with torch_mux.quota(tenant):
                    futures.append(torch_mux.submit(model, x))
            for future in futures:
                future.result()
    return models


@pytest.mark.parametrize("device", DEVICES)
def test_every_bundle_and_request_is_in_the_file(device: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    _serve(1, device)
    torch_mux.reset()
    with torch_mux.trace(path) as timeline:
        _serve(5, device)
    stats = torch_mux.stats()
    events = json.loads(path.read_text())["traceEvents"]
    names = {(e["pid"], e.get("tid")): e["args"]["name"] for e in events if e["ph"] == "M"}
    bundles = [event for event in events if event["ph"] == "X"]
    assert len(bundles) == stats.bundles == len(timeline.spans) and timeline.dropped == 0
    assert {names[event["pid"], event["tid"]] for event in bundles} == {"lane 0"}
    assert sum(event["dur"] for event in bundles) == pytest.approx(stats.device_seconds * 1e6)
    begins = [event for event in events if event["ph"] == "b" and event["name"] == "Net"]
    ends = {(event["id"], event["name"]): event["ts"] for event in events if event["ph"] == "e"}
    served = Counter(names[event["pid"], event["tid"]] for event in begins)
    assert served == {name: got.accepted for name, got in stats.tenants.items()}
    assert all(event["args"]["outcome"] == "done" for event in begins)
    for event in begins:
        inner = next(e for e in events if e["ph"] == "b" and e["id"] == event["id"] and e is not event)
        assert event["ts"] <= inner["ts"] + 1e-3
        assert ends[event["id"], "Net"] == pytest.approx(ends[event["id"], "in its bundle"])
        bundle = bundles[event["args"]["bundle"]]
        assert names[event["pid"], event["tid"]] in bundle["args"]["tenants"]


def test_the_lane_of_a_reserve_shows(tmp_path: Path) -> None:
    _serve(1)
    path = tmp_path / "trace.json"
    with torch_mux.trace(path) as timeline, torch_mux.quota("carol", reserve=0.2):
        _serve(1)
    assert {span.lane for span in timeline.spans if span.reserved} == {1}
    events = json.loads(path.read_text())["traceEvents"]
    assert "lane 1 (reserve)" in {event["args"]["name"] for event in events if event["ph"] == "M"}


def test_nothing_is_recorded_outside_and_two_may_record() -> None:
    with torch_mux.trace() as outer:
        _serve(1)
        with torch_mux.trace() as inner:
            _serve(1)
    seen = len(outer.spans)
    assert 0 < len(inner.spans) < seen
    _serve(1)
    assert len(outer.spans) == seen


def test_what_raises_is_no_bundle(tmp_path: Path) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.table(x)

    model = torch.compile(Broken().eval(), backend="mux")
    path = tmp_path / "trace.json"
    with torch_mux.trace(path), torch.inference_mode():
        torch_mux.gather((model, torch.tensor([1])))
        with pytest.raises(torch_mux.ExecutionFailed):
            torch_mux.gather((model, torch.tensor([9])))
    begins = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "b"]
    assert [event["args"]["outcome"] for event in begins if event["name"] == "Broken"] == ["done"]


def test_the_file_is_written_after_an_exception(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with pytest.raises(RuntimeError, match="inside"), torch_mux.trace(path):
        raise RuntimeError("inside")
    assert json.loads(path.read_text())["traceEvents"]


def test_a_profiler_shows_bundles_and_tenants() -> None:
    models = _serve(2)
    x = torch.randn(2, 8)
    with torch.inference_mode(), profile() as found, torch_mux.quota("alice"):
        torch_mux.gather(*((model, x) for model in models))
    seen = {event.name: event for event in found.events() if event.name.startswith("mux::")}
    assert {"mux::bundle Net x3", "mux::tenant alice"} <= set(seen)
    inner, outer = seen["mux::tenant alice"].time_range, seen["mux::bundle Net x3"].time_range
    assert outer.start <= inner.start and inner.end <= outer.end


SCRIPT = """
import sys, torch, torch_mux
from torch import nn
assert sys.argv[1:] == ["--some", "argument"] and __name__ == "__main__"
models = [torch.compile(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), backend="mux") for _ in range(2)]
with torch.inference_mode(), torch_mux.quota("dora"):
    for _ in range(2):
        torch_mux.gather(*((model, torch.ones(1, 4)) for model in models))
"""


def test_the_command_traces_a_program(tmp_path: Path) -> None:
    (tmp_path / "serve.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch_mux.cli", "trace", "-o", "out.json", "serve.py"]
    done = subprocess.run(
        [*command, "--some", "argument"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "with 4 requests in out.json" in done.stdout
    tracks = [
        e["args"]["name"]
        for e in json.loads((tmp_path / "out.json").read_text())["traceEvents"]
        if e["ph"] == "M"
    ]
    assert "dora" in tracks and "cpu" in tracks


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch_mux.cli", "trace", "nothing.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and "no program nothing.py" in done.stderr

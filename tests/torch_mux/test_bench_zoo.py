"""The zoo: rows that tell the truth, and nothing that an entry does ends the run or drops its row."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo_subjects
from torch import Tensor, nn

from torch_mux.bench import vision, zoo, zoo_entry, zoo_table
from torch_mux.bench.workloads import WORKLOADS, Workload
from torch_mux.bench.zoo_models import ZOO, answer, entry_of

CPU = torch.device("cpu")
RECORD = Path(__file__).parents[2] / "docs" / "benchmarks" / "zoo-cpu.json"


def measured(workload: Workload) -> tuple[dict[str, Any], list[str]]:
    """The row of one entry in this process, and what was there after every step."""
    saved: list[str] = []
    row = zoo_entry.row_of(workload, CPU, torch.float32, lambda row: saved.append(json.dumps(row)))
    return row, saved


def test_there_are_enough_architectures_of_every_kind() -> None:
    assert len(ZOO) >= 48
    kinds = [entry.kind for entry in ZOO.values()]
    assert all(kinds.count(kind) >= 4 for kind in set(kinds)) and len(set(kinds)) == 6
    assert all(name == entry.name for name, entry in ZOO.items())


def test_a_row_tells_what_runs_how_right_and_what_coalesces() -> None:
    row, saved = measured(ZOO["mlp"])
    assert row["errors"] == {}
    for contender in ("eager", "inductor", "mux"):
        assert 0 < row[contender]["mean"] <= row[contender]["worst"] < 1e-6, contender
        assert row[contender]["answers"] == zoo_entry.SLOTS
    assert row["same_bits"] is True and row["path"] == "learned" and row["launches"] is None
    assert row["coalesced"] == 1.0 and row["flops"] == 2 * (3 * 256 * 256 + 256 * 16)
    assert row["operations"]["super_kernels"] == 4 and row["operations"]["alone"] == 0
    assert row["reasons"] == [] and row["notes"] == []
    assert row["weights"] == 4 * (3 * 256 * 257 + 257 * 16)
    assert 0 < row["memory"]["held"] < 0.1 * row["weights"] and row["memory"]["device"] is None
    assert row["compile_seconds"] > 0 and row["inductor_seconds"] > 0
    assert len(saved) > len(zoo_entry.STEPS)
    assert json.loads(saved[-1]) == row


class Partial(nn.Module):
    """One operation without a rule; its model counts its calls, which keeps it on the guarded path."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.calls = nn.Linear(8, 8), 0

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        return {"number": x.argmax(-1), "spectrum": torch.fft.rfft(self.line(x)).abs()}


def test_a_row_tells_why_something_does_not_coalesce() -> None:
    features = ZOO["mlp"].inputs
    workload = Workload("partial", Partial, lambda generator: (features(generator)[0][:, :8],), answer)
    row, _ = measured(workload)
    assert row["errors"] == {}
    assert {reason["kind"] for reason in row["reasons"]} == {"NO_RULE"}
    assert sum(reason["count"] for reason in row["reasons"]) == row["operations"]["alone"] > 0
    assert row["path"] == "guarded" and "side effect" in row["notes"][0]["detail"]
    assert row["coalesced"] == 1.0  # all of the work that counts is the linear layer


def test_a_wrong_answer_shows_in_the_table() -> None:
    good = {"model": "m", "errors": {}, "eager": {"mean": 1e-3}, "inductor": {"mean": 2e-3}}
    assert not zoo_table.inaccurate({**good, "mux": {"mean": 2.1e-3}})
    assert zoo_table.inaccurate({**good, "mux": {"mean": 2.3e-3}})
    assert not zoo_table.inaccurate(good)
    facts = {
        "device": "d",
        "torch": "t",
        "triton": "r",
        "commit": "c",
        "command": "python -m torch_mux.bench.zoo",
    }
    report = {"environment": facts, "options": {"dtype": "float32"}}
    report["results"] = [{**good, "mux": {"mean": 0.5}, "same_bits": False}]  # type: ignore[assignment]
    text = zoo_table.table(report)
    assert "5.0e-01!" in text and "DIFFER" in text and "1 with other bits alone" in text


def test_failing_entries_are_rows_and_do_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    support = str(Path(zoo_subjects.__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([support, os.environ.get("PYTHONPATH", "")]))
    path, page = tmp_path / "records" / "zoo.json", tmp_path / "zoo.md"
    wrong = ("raising", "unbuildable", "crashing", "missing")
    names = [*(f"zoo_subjects:{name}" for name in wrong), "mlp"]
    flags = [
        "--device",
        "cpu",
        "--jobs",
        "3",
        "--threads",
        "1",
        "--share-caches",
        "--json",
        str(path),
        "--markdown",
        str(page),
    ]
    assert zoo.main([*names, *flags]) == 1
    record = json.loads(path.read_text())
    rows = {row["model"].rpartition(":")[2]: row for row in record["results"]}
    assert sorted(rows) == sorted([*wrong, "mlp"])
    assert {row["commit"] for row in rows.values()} == {record["environment"]["commit"]}
    assert rows["mlp"]["errors"] == {} and rows["mlp"]["coalesced"] == 1.0
    assert set(rows["raising"]["errors"]) >= {"exact", "eager", "mux", "inductor"}
    assert rows["raising"]["errors"]["eager"] == "RuntimeError: there is no float64 answer to compare with"
    assert rows["raising"]["errors"]["exact"] == "ValueError: cannot | run"
    assert rows["unbuildable"]["errors"] == {"build": "RuntimeError: no such architecture"}
    assert "SIGSEGV" in rows["crashing"]["errors"]["process"]
    assert "about to crash" in rows["crashing"]["errors"]["process"]
    assert "missing" in rows["missing"]["errors"]["process"]
    assert record["options"]["jobs"] == 3 and record["environment"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert "SIGSEGV" in printed and "shared compile caches" in printed and "5 architectures: 1 ran" in printed
    assert page.read_text().count("\n| ") == 6 and "cannot \\| run" in page.read_text()
    assert zoo.main(["--show", str(path)]) == 1
    assert capsys.readouterr().out == printed


def test_an_entry_that_takes_too_long_is_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(zoo_subjects.__file__).parent))
    monkeypatch.setenv("ZOO_SUBJECTS_PID", str(tmp_path / "pid"))
    start, path = time.monotonic(), tmp_path / "zoo.json"
    flags = ["--device", "cpu", "--limit", "3", "--json", str(path)]
    assert zoo.main(["zoo_subjects:hanging", *flags]) == 1
    assert time.monotonic() - start < 60
    (row,) = json.loads(path.read_text())["results"]
    assert row["errors"]["process"] == "TimeoutError: not done after 3 s"
    assert "TimeoutError: not done after 3 s" in capsys.readouterr().out


def test_a_run_that_is_ended_ends_its_entries(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    environment = os.environ | {
        "PYTHONPATH": str(Path(zoo_subjects.__file__).parent),
        "ZOO_SUBJECTS_PID": str(path),
    }
    command = [sys.executable, "-m", "torch_mux.bench.zoo", "zoo_subjects:hanging", "--device", "cpu"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(path.read_text()), 0)


def test_torchvision_of_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its compiled operations do not load; their names are declared, and the second import succeeds."""
    fails = [RuntimeError("operator torchvision::nms does not exist")]

    def importing(name: str) -> str:
        if fails:
            raise fails.pop()
        return name

    monkeypatch.setattr(vision.importlib, "import_module", importing)  # type: ignore[attr-defined]
    monkeypatch.setattr(vision, "_DECLARED", ("declared_by_a_test",))
    monkeypatch.setattr(vision, "_libraries", [])
    assert vision.import_torchvision() == "torchvision"
    assert hasattr(torch.ops.torchvision, "declared_by_a_test")
    fails.append(RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        vision.import_torchvision()


def test_the_record_that_is_shown_is_of_this_table() -> None:
    record = json.loads(RECORD.read_text())
    assert len(record["results"]) >= 25 and record["environment"]["commit"]
    text = zoo_table.table(record)
    assert all(row["model"] in text for row in record["results"])
    assert {row["model"] for row in record["results"]} <= set(ZOO)


def test_a_later_run_keeps_the_rows_of_other_entries(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    old = {"results": [{"model": "mlp", "commit": "a"}, {"model": "bert", "commit": "a"}], "options": {}}
    new = {
        "results": [{"model": "mlp", "commit": "b"}, {"model": "vgg", "commit": "b"}],
        "options": {"jobs": 1},
    }
    found = zoo.merged(old, new)
    assert [(row["model"], row["commit"]) for row in found["results"]] == [
        ("vgg", "b"),
        ("bert", "a"),
        ("mlp", "b"),
    ]
    assert found["options"] == {"jobs": 1}
    path = tmp_path / "zoo.json"
    path.write_text(json.dumps({"results": [], "options": {"device": "cpu", "dtype": "float16"}}))
    with pytest.raises(SystemExit, match="2"):
        zoo.main(["mlp", "--device", "cpu", "--keep", "--json", str(path)])
    assert "was measured with another dtype, float16" in capsys.readouterr().err


SOME = ("squeezenet", "fpn", "swin-v2", "mobilevit", "t5-encoder", "vit-mae", "unet")


@pytest.mark.parametrize("name", SOME)
def test_architectures_are_built_and_answer(name: str) -> None:
    packages = {ZOO[name].package, "torchvision"} if ZOO[name].package else set[str]()
    if any(importlib.util.find_spec(package) is None for package in packages):
        pytest.skip(f"needs {', '.join(sorted(packages))}")
    torch.manual_seed(0)
    model, args = ZOO[name].model(), ZOO[name].inputs(torch.Generator().manual_seed(0))
    assert not any(module.training for module in model.modules())
    with torch.inference_mode():
        found = [ZOO[name].tensor(model(*args)) for _ in range(2)]
    assert torch.equal(*found) and found[0].isfinite().all() and found[0].std() > 0


def test_entries_of_ones_own() -> None:
    assert entry_of("mlp") is ZOO["mlp"]
    assert entry_of("zoo_subjects:raising") is zoo_subjects.raising
    with pytest.raises(KeyError, match="Raising is a type, no Workload"):
        entry_of("zoo_subjects:Raising")
    with pytest.raises(KeyError):
        entry_of(next(iter(WORKLOADS)) + "-of-nowhere")


def test_the_compared_tensor_is_the_first_of_floating_point() -> None:
    whole, real = torch.zeros(1, dtype=torch.int64), torch.zeros(2)
    assert answer({"ids": whole, "more": (whole, [real, torch.ones(1)])}) is real
    with pytest.raises(TypeError, match="no floating-point tensor in a tuple"):
        answer((whole, None))


@pytest.mark.gpu
def test_a_row_on_a_gpu_counts_launches_and_bytes() -> None:
    row = zoo_entry.row_of(ZOO["mlp"], torch.device("cuda"), torch.float16, lambda row: None)
    assert row["errors"] == {} and row["same_bits"] is True and row["coalesced"] == 1.0
    assert 0 < row["launches"]["kernels"] < row["inductor_launches"]["kernels"]
    assert row["memory"]["device"] is not None and row["memory"]["device"] < 0.1 * row["weights"]
    assert not zoo_table.inaccurate(row)

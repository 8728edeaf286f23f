"""The start benchmark: fresh processes, from the import of torch to coalesced answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from torch_mux.bench import start


def test_it_measures_fresh_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "start.json"
    flags = ["--model", "tiny-cnn", "--tenants", "2", "--device", "cpu", "--repetitions", "1"]
    assert start.main([*flags, "--json", str(record)]) == 0
    report = json.loads(record.read_text())
    assert report["options"]["tenants"] == 2 and set(report["results"]) == set(start.CONTENDERS)
    for contender, counted in report["results"].items():
        assert len(counted) == 1
        for found in (report["first"][contender], *counted):
            assert all(found[part] > 0 for part in start.PARTS)
            assert sum(found[part] for part in start.PARTS) < found["process"]
            assert (found["bundles"] >= 2) == (contender == "mux")
    printed = capsys.readouterr().out
    assert "tiny-cnn x 2" in printed and "warm" in printed


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "lenet"], "unknown model"),
        (["--tenants", "0"], "at least 1"),
        (["--contenders", "mux,tpu"], "tpu"),
    ],
)
def test_wrong_arguments_are_named(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        start.main([*flags, "--device", "cpu"])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="no-such-model"):
        start.run("no-such-model", 1, "cpu", "float32", 1)

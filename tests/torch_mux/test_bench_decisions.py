"""The script that measures the cost of the policy: every case runs and is written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from torch_mux.bench import decisions


def test_every_case_is_measured_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decisions, "_REPEATS", 1)
    assert decisions.main(["--requests", "300", "--json", str(tmp_path / "found.json")]) == 0
    report: dict[str, Any] = json.loads((tmp_path / "found.json").read_text())
    assert len(report["results"]) == len(decisions.CASES)
    assert all(found["us a request"] > 0 for found in report["results"])
    assert len(capsys.readouterr().out.strip().splitlines()) >= len(decisions.CASES)


def test_a_run_of_no_requests_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        decisions.main(["--requests", "0"])
    assert "--requests" in capsys.readouterr().err

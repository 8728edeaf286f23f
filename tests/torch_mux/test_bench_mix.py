"""The benchmark of mixes: its rows, its record and its table, on small models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import torch_mux
from torch_mux.bench import mix
from torch_mux.bench.mix_rows import ROWS, workload_of


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch_mux.reset()
    yield
    torch_mux.reset()


def test_own_plans_and_packed_on_small_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mix.json"
    flags = ["--rows", "tiny", "--contenders", "serial,packed", "--repetitions", "1", "--rounds", "4"]
    assert mix.main([*flags, "--json", str(path), "--device", "cpu", "--dtype", "float32"]) == 0
    report = json.loads(path.read_text())
    serial, packed = report["results"]
    assert [record["tenants"] for record in (serial, packed)] == [5, 5]
    for record in (serial, packed):
        assert record["error"]["worst"] < 1e-4
        assert record["pipelined_us"]["median"] > 0
    assert serial["notes"]["mixes"] == []
    (built,) = packed["notes"]["mixes"]
    assert built["state"] == "runs as one" and built["joint"] > 0
    assert sorted(slots for _, slots in built["members"]) == [1, 2, 2]
    text = capsys.readouterr().out
    assert "torch-mux, packed" in text and "vs own" in text


def test_lengths_on_branches_and_packed(tmp_path: Path) -> None:
    path = tmp_path / "mix.json"
    flags = ["--rows", "tiny-lengths", "--contenders", "branches,auto,packed", "--repetitions", "1"]
    assert (
        mix.main(
            [*flags, "--rounds", "4", "--json", str(path), "--device", "cpu", "--dtype", "float32"],
        )
        == 0
    )
    branches, auto, packed = json.loads(path.read_text())["results"]
    for record in (branches, auto, packed):
        assert record["tenants"] == 6 and record["error"]["worst"] < 1e-4
    (built,) = packed["notes"]["mixes"]
    assert [slots for _, slots in built["members"]].count(2) == 2, "odd lengths twice"
    assert built["seconds"] > 0 and mix._predicted(packed) == f"{built['seconds'] * 1e6:.0f}"
    assert mix._predicted(branches) == "-"


def test_a_contender_that_fails_is_a_row_with_its_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(mix.MuxMix):
        def prepare(self, tenants: object, counts: object) -> None:
            raise ValueError("no such thing")

    monkeypatch.setitem(mix.CONTENDERS, "packed", lambda: Broken("broken"))
    flags = ["--rows", "tiny", "--contenders", "packed,serial", "--repetitions", "1", "--rounds", "2"]
    assert mix.main([*flags, "--device", "cpu", "--dtype", "float32"]) == 1
    text = capsys.readouterr().out
    assert "tiny: broken failed: ValueError: no such thing" in text
    assert "own plans, one after another" in text


@pytest.mark.parametrize("wrong", [["--rows", "none"], ["--contenders", "none"], ["--rounds", "0"]])
def test_wrong_words_are_told(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        mix.main(["--device", "cpu", *wrong])
    assert ended.value.code == 2
    assert "none" in capsys.readouterr().err or wrong[0] == "--rounds"


def test_rows_are_those_of_the_table() -> None:
    assert {name: row.tenants for name, row in ROWS.items()} == {
        "four": 16, "encoders": 16, "lengths": 16, "cnns": 12, "tiny": 5, "tiny-lengths": 6,
    }  # fmt: skip
    assert all(count > 0 for row in ROWS.values() for _, count in row.members)
    assert workload_of("bert-48").name == "bert-48"

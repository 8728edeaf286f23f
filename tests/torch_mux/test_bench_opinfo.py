"""The sweep over PyTorch's operator database: a small part of it, and that it notices wrong answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from torch_mux import compat
from torch_mux.bench import opinfo

OPERATIONS = ["add", "cat", "nn.functional.layer_norm", "linalg.qr", "nonzero", "split", "take_along_dim"]


def test_a_part_of_the_database(tmp_path: Path) -> None:
    path = tmp_path / "opinfo.json"
    options = ["--interpret", "--samples", "1", "--json", str(path), "--ops", *OPERATIONS]
    compiler = compat.inductor_compile
    assert opinfo.main(options) == 0
    assert compat.inductor_compile is compiler
    record = json.loads(path.read_text())
    assert record["interpreted"] and record["operations"] >= len(OPERATIONS)
    assert record["totals"]["right"] >= len(OPERATIONS) and record["totals"]["failures"] == 0
    assert record["by operation"]["add float32"]["coalesced"] == 1
    assert any(
        "_linalg_qr" in reason or "linalg_qr" in reason
        for reason in record["by operation"]["linalg.qr float32"]["reasons"]
    )


def test_a_wrong_answer_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(graph: torch.fx.GraphModule, *_: object) -> object:
        return lambda arguments: [
            value + 1 if isinstance(value, Tensor) else value for value in graph(*arguments)
        ]

    monkeypatch.setattr(compat, "inductor_compile", wrong)
    (outcome,) = opinfo.sweep(opinfo.operations(["nn.functional.relu6"], (0, 1)), [torch.float32], 1).values()
    assert outcome.failures == ["another answer than eager"] and outcome.right == 0


def test_shards_are_all_of_it_once() -> None:
    whole = opinfo.operations([], (0, 1))
    parts = [op for number in range(3) for op in opinfo.operations([], (number, 3))]
    assert len(whole) > 400 and sorted(map(id, whole)) == sorted(map(id, parts))

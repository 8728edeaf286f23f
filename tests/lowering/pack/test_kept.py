"""Schedules on disk: read again, and made again where a file is not what was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from torch_mux import compat
from torch_mux.lowering import kept
from torch_mux.lowering.kernels import choose
from torch_mux.lowering.kernels.operation import Operation, linear_operation
from torch_mux.lowering.pack import kept as schedules
from torch_mux.lowering.pack.kept import schedule_of


def linear(slots: int, m: int, n: int, k: int) -> Operation:
    sizes = ((m, n, k),) * slots
    bit_class = choose.linear_class(sizes, torch.float16)
    named: dict[str, Any] = {"scale": None, "shift": torch.float16, "residual": False, "activation": "gelu"}
    return linear_operation(sizes, torch.float16, bit_class, k_major=True, **named)


MEMBERS = [[linear(2, 197, 768, 768), linear(2, 197, 3072, 768)], [linear(2, 128, 768, 768)] * 3]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(compat, "cache_folder", lambda name: tmp_path / name)
    return tmp_path / "schedules"


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a schedule was made."""
    calls: list[int] = []
    original = schedules.pack

    def counting(*args: Any, **named: Any) -> Any:
        calls.append(1)
        return original(*args, **named)

    monkeypatch.setattr(schedules, "pack", counting)
    return calls


def test_a_schedule_is_made_once(folder: Path, packed: list[int]) -> None:
    first = schedule_of(MEMBERS, 132)
    assert first.complete
    assert schedule_of(MEMBERS, 132) == first
    assert len(packed) == 1
    schedule_of(MEMBERS, 66)
    schedule_of(MEMBERS, 132, match=False)
    schedule_of(MEMBERS[::-1], 132)
    assert len(packed) == 4
    assert len(list(folder.iterdir())) == 4


def test_nothing_is_kept_where_it_shall_not(folder: Path, packed: list[int]) -> None:
    schedule_of(MEMBERS, 132, keep=False)
    schedule_of(MEMBERS, 132, keep=False)
    assert len(packed) == 2
    assert not folder.exists()


@pytest.mark.parametrize("fault", ["truncated", "another's", "not all", "no schedule", "empty"])
def test_what_is_damaged_is_made_again(folder: Path, packed: list[int], fault: str) -> None:
    want = schedule_of(MEMBERS, 132)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    if fault == "truncated":
        path.write_bytes(whole[:-10])
    elif fault == "empty":
        path.write_bytes(b"")
    else:
        data = json.loads(whole[32:])
        if fault == "not all":
            data["words"] = data["words"][1:]
        elif fault == "another's":
            data["words"][0]["strands"][0][1][0][0] = [7, 0]
        else:
            data = ["words"]
        kept.write("schedules", path.name, json.dumps(data).encode())
    assert schedule_of(MEMBERS, 132) == want
    assert len(packed) == 2
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_no_error(folder: Path, packed: list[int]) -> None:
    folder.write_text("a file where the folder should be")
    assert schedule_of(MEMBERS, 132).complete

"""What becomes of a contender that fails, is wrong, takes too long, or is interrupted."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_mux.bench import measure, models
from torch_mux.bench.contenders import CONTENDERS, Eager
from torch_mux.bench.workloads import Tenants

CPU = torch.device("cpu")


class Broken(Eager):
    """Fails when it prepares."""

    name = "broken peer"

    def prepare(self, tenants: Tenants, counts: Sequence[int]) -> None:
        raise ValueError("no such kernel")


class Slow(Eager):
    """Takes too long to prepare, and says something else when it is stopped."""

    name = "slow peer"

    def prepare(self, tenants: Tenants, counts: Sequence[int]) -> None:
        try:
            time.sleep(20)
        except TimeoutError as error:
            raise ValueError("compilation failed") from error


class Wrong(Eager):
    """A little wrong, where rounding explains nothing."""

    name = "wrong peer"
    released = False

    def round(self, requests: Sequence[tuple[Tensor, ...]]) -> Sequence[Any]:
        return [1.001 * answer for answer in super().round(requests)]

    def release(self) -> None:
        Wrong.released = True


class Tiring(Eager):
    """Fails in the middle of being timed."""

    name = "tiring peer"

    def __init__(self) -> None:
        super().__init__()
        self.left = 12

    def round(self, requests: Sequence[tuple[Tensor, ...]]) -> Sequence[Any]:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("out of breath")
        return super().round(requests)


def test_a_peer_that_fails_is_in_the_record_and_in_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONTENDERS, "broken", Broken)
    monkeypatch.setitem(CONTENDERS, "tiring", Tiring)
    path = tmp_path / "out.json"
    flags = "--device cpu --models tiny-cnn --tenants 1,2 --rounds 4 --repetitions 2"
    flags += " --contenders broken,tiring,eager --json"
    assert models.main([*flags.split(), str(path)]) == 1
    records = {(r["contender"], r["tenants"]): r for r in json.loads(path.read_text())["results"]}
    assert len(records) == 6
    for count in (1, 2):
        assert records["broken peer", count]["failed"] == "ValueError: no such kernel"
        assert records["tiring peer", count]["failed"] == "RuntimeError: out of breath"
        assert records["tiring peer", count]["error"]["worst"] < 1e-5  # what it did before is kept
        assert records[Eager.name, count]["repetitions"] == 2
    printed = capsys.readouterr()
    assert "tiny-cnn: broken peer failed: ValueError: no such kernel" in printed.out
    assert "no GPU is used: measuring on the CPU (tiny-cnn at 1, 2 tenants)" in printed.err


def test_a_peer_whose_answers_are_wrong_or_late_is_reported_and_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(CONTENDERS, "wrong", Wrong)
    monkeypatch.setitem(CONTENDERS, "slow", Slow)
    options = models.Options(
        models=("tiny-cnn",), tenants=(2,), contenders=("wrong", "slow", "eager"), device=CPU,
        dtype=torch.float32, repetitions=1, rounds=4, limit=2.0,
    )  # fmt: skip
    report = models.run(options)
    wrong, slow, eager = report["results"]
    assert wrong["failed"].startswith("WrongAnswers: relative l2 error 1.0e-03 at 2 tenants")
    assert wrong["error"]["worst"] == pytest.approx(1e-3, rel=0.01)
    assert Wrong.released
    assert slow["failed"] == "OverLimit: preparing slow for tiny-cnn took longer than 2 s"
    assert 2 <= slow["prepare_seconds"] < 15
    assert "pipelined_us" not in wrong and "pipelined_us" not in slow and "pipelined_us" in eager
    assert "tiny-cnn: wrong peer failed: WrongAnswers" in models.table(report)


def test_preparations_share_a_time_and_whose_turn_comes_later_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(CONTENDERS, "slow", Slow)
    options = models.Options(
        models=("tiny-cnn",), tenants=(2,), contenders=("eager", "slow", "inductor"), device=CPU,
        dtype=torch.float32, repetitions=1, rounds=4, preparing=0.5,
    )  # fmt: skip
    eager, slow, late = models.run(options)["results"]
    assert "pipelined_us" in eager
    assert slow["failed"].startswith("OverLimit: preparing slow for tiny-cnn took longer than 0.4")
    assert late["failed"].startswith("OverLimit: preparing other contenders has taken the 0.5 s")


def test_what_was_prepared_is_released_when_the_user_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> float:
        raise KeyboardInterrupt

    released: list[str] = []
    monkeypatch.setattr(Eager, "release", lambda self: released.append(self.name))
    monkeypatch.setattr(measure, "pipelined", interrupted)
    options = models.Options(
        models=("tiny-mlp",), tenants=(2,), contenders=("eager",), device=CPU, dtype=torch.float32, rounds=4
    )
    with pytest.raises(KeyboardInterrupt):
        models.run(options)
    assert released == [Eager.name]


def test_a_record_tells_how_fast_the_host_is() -> None:
    told = measure.environment(torch.device("cpu"))["python_call_ns"]
    assert 1.0 < told < 10_000.0
    assert measure.call_seconds(calls=100) > 0.0

"""The open-loop benchmark: arrivals, what counts as latency, the search, and failures."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_mux.bench import serve
from torch_mux.bench.arrivals import PROCESSES, arrivals
from torch_mux.bench.servers import Finished
from torch_mux.bench.workloads import WORKLOADS, Tenants, build


@pytest.mark.parametrize("process", sorted(PROCESSES))
def test_arrivals_have_the_rate_and_the_variation_they_say(process: str) -> None:
    found = arrivals(process, 4000.0, 20.0, 4, 3, seed=1)
    assert (
        found
        == arrivals(process, 4000.0, 20.0, 4, 3, seed=1)
        != arrivals(process, 4000.0, 20.0, 4, 3, seed=2)
    )
    assert [one.time for one in found] == sorted(one.time for one in found)
    assert len(found) == pytest.approx(80_000, rel=0.08)
    assert {one.tenant for one in found} == set(range(4)) and {one.variant for one in found} == set(range(3))
    times = [one.time for one in found if one.tenant == 0]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(PROCESSES[process], rel=0.1)


def test_another_rate_has_the_same_arrivals_closer_together() -> None:
    slow, fast = (arrivals("bursty", rate, 100.0 / rate, 2, 1, seed=3) for rate in (10.0, 20.0))
    assert [one.tenant for one in slow] == [one.tenant for one in fast]
    assert [one.time for one in slow] == pytest.approx([2 * one.time for one in fast])


@pytest.mark.parametrize(("rate", "seconds"), [(0.0, 1.0), (1.0, -1.0)])
def test_arrivals_refuse_nonsense(rate: float, seconds: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        arrivals("poisson", rate, seconds, 1, 1, 0)


class _Slow:
    """Answers after a while on a thread; the first of ``lost`` requests never."""

    name = "slow"

    def __init__(self, seconds: float = 0.0, lost: int = 0, error: BaseException | None = None) -> None:
        self.seconds, self.lost, self.error = seconds, lost, error
        self.stall = 0.0

    def prepare(self, tenants: Tenants) -> None:
        if self.error is not None:
            raise self.error

    def submit(self, number: int, tenant: int, arguments: tuple[Tensor, ...], finished: Finished) -> None:
        if number == 0:
            time.sleep(self.stall)
        if number >= self.lost:
            timer = threading.Timer(self.seconds, lambda: finished(number, time.perf_counter(), None))
            timer.daemon = True
            timer.start()

    def poll(self) -> None: ...

    def release(self) -> None: ...


@pytest.fixture(scope="module")
def tenants() -> Tenants:
    return build(WORKLOADS["tiny-cnn"], 2, torch.device("cpu"), torch.float32)


def _options(**changes: Any) -> serve.Options:
    plain: dict[str, Any] = {
        "model": "tiny-cnn",
        "tenants": 2,
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "servers": ("mux",),
        "process": "poisson",
        "bound": 0.01,
        "seconds": 0.3,
        "steps": 2,
        "seed": 0,
    }
    return serve.Options(**(plain | changes))


def test_latency_counts_from_the_scheduled_time(tenants: Tenants) -> None:
    quick = serve.open_loop(_Slow(0.005), tenants, _options(), 100.0)
    assert quick.missing == quick.errors == 0 and quick.requests > 10
    assert quick.quantiles["p50"] is not None and 0.005 <= quick.quantiles["p50"] < 0.1
    stalled = _Slow(0.0)
    stalled.stall = 0.2
    found = serve.open_loop(stalled, tenants, _options(), 100.0)
    # The generator stood still for 0.2 s: what was due meanwhile waited, though the server was quick.
    assert found.p99 > 0.1 and found.lag > 0.1


def test_what_is_never_answered_is_infinitely_late(tenants: Tenants, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_PATIENCE", 0.2)
    found = serve.open_loop(_Slow(lost=3), tenants, _options(), 100.0)
    assert found.missing == 3
    assert found.quantiles["p99.9"] is None and found.p99 == math.inf


def test_the_search_finds_the_edge() -> None:
    def run(rate: float) -> serve.Load:
        p99 = 0.002 if rate <= 700.0 else 0.05
        return serve.Load(rate, rate, 10, 0, 0, {"p50": p99, "p99": p99}, 0.0, 0.0)

    best, runs = serve.search(run, 1600.0, 0.01, 10)
    assert len(runs) == 10 and 690.0 < best <= 700.0
    assert serve.search(run, 1600.0, 0.001, 4)[0] == 0.0


def test_a_run_on_the_cpu_fills_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "serve.json"
    flags = ["--model", "tiny-cnn", "--tenants", "2", "--device", "cpu", "--seconds", "0.3", "--steps", "2"]
    assert serve.main([*flags, "--bound", "1s", "--json", str(record)]) == 0
    report = json.loads(record.read_text())
    assert [found["server"] for found in report["results"]] == ["mux", "inductor"]
    for found in report["results"]:
        assert found["closed loop"] > 0 and len(found["runs"]) == 2
        assert all(one["missing"] == one["errors"] == 0 for one in found["runs"])
    assert "tiny-cnn x 2, poisson arrivals" in capsys.readouterr().out


def test_a_server_that_fails_is_a_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(serve.SERVERS, "mux", lambda: _Slow(error=RuntimeError("no such luck")))
    flags = ["--model", "tiny-cnn", "--tenants", "1", "--device", "cpu", "--servers", "mux"]
    assert serve.main(flags) == 1
    assert "RuntimeError: no such luck" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "lenet"], "unknown model"),
        (["--servers", "mux,tpu"], "unknown servers tpu"),
        (["--tenants", "0"], "must be positive"),
        (["--bound", "soon"], "--bound"),
    ],
)
def test_wrong_arguments_are_named(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        serve.main([*flags, "--device", "cpu"])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err

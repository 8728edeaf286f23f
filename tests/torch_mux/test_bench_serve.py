"""The load generator and the command: arrivals, what counts as latency, the search, failures."""

from __future__ import annotations

import gc
import heapq
import itertools
import json
import math
import queue
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from torch_mux import state
from torch_mux.bench import load, serve
from torch_mux.bench.arrivals import PROCESSES, arrivals
from torch_mux.bench.figures.base import Finding, Row
from torch_mux.bench.figures.stage import Stage
from torch_mux.bench.load import Client, Finished, Got, Outcome, Shot, Traffic, Window, drive, search
from torch_mux.bench.servers import warmed


@pytest.mark.parametrize("process", sorted(PROCESSES))
def test_arrivals_have_the_rate_and_the_variation_they_say(process: str) -> None:
    rates = [1000.0] * 3 + [0.0, 500.0]
    found = arrivals(process, rates, 20.0, 3, seed=1)
    assert found == arrivals(process, rates, 20.0, 3, seed=1) != arrivals(process, rates, 20.0, 3, seed=2)
    assert [one.time for one in found] == sorted(one.time for one in found)
    assert len(found) == pytest.approx(70_000, rel=0.08)
    assert {one.tenant for one in found} == {0, 1, 2, 4} and {one.variant for one in found} == set(range(3))
    times = [one.time for one in found if one.tenant == 0]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(PROCESSES[process], rel=0.1)


def test_another_rate_has_the_same_arrivals_closer_together() -> None:
    slow, fast = (arrivals("bursty", [rate] * 2, 100.0 / rate, 1, seed=3) for rate in (5.0, 10.0))
    assert [one.tenant for one in slow] == [one.tenant for one in fast]
    assert [one.time for one in slow] == pytest.approx([2 * one.time for one in fast])


@pytest.mark.parametrize(("rate", "seconds"), [(-1.0, 1.0), (1.0, 0.0)])
def test_arrivals_refuse_nonsense(rate: float, seconds: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        arrivals("poisson", [rate], seconds, 1, 0)


class _World:
    """Time that passes while somebody sleeps, and what happens then."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = itertools.count()

    def perf_counter(self) -> float:
        return self.now

    def after(self, seconds: float, what: Callable[[], object]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), what))

    def sleep(self, seconds: float) -> None:
        end = self.now + seconds
        while self._events and self._events[0][0] <= end:
            self.now, _, what = heapq.heappop(self._events)
            what()
        self.now = end

    def event(self) -> Any:
        """Whoever waits for it sleeps: what would set it happens meanwhile."""
        nothing = SimpleNamespace(set=lambda: None, clear=lambda: None)
        nothing.wait = self.sleep
        return nothing


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> _World:
    made = _World()
    clocks = {name: getattr(time, name) for name in ("thread_time", "process_time")}
    told = SimpleNamespace(perf_counter=made.perf_counter, sleep=made.sleep, **clocks)
    monkeypatch.setattr(load, "time", told)
    monkeypatch.setattr(load, "threading", SimpleNamespace(Event=made.event))
    return made


class _Slow:
    """Answers after a while; the first ``lost`` requests never, every ``bad``th with an error."""

    name = "slow"
    polled = False

    def __init__(self, world: _World, seconds: float = 0.0, lost: int = 0, bad: int = 0) -> None:
        self.world = world
        self.seconds, self.lost, self.bad = seconds, lost, bad
        self.stall = 0.0
        self.under_way = self.most = 0

    def submit(self, batch: Sequence[Shot], finished: Finished) -> None:
        for number, _, _ in batch:
            if number == 0:
                self.world.sleep(self.stall)
            if number < self.lost:
                continue
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            self.world.after(self.seconds, partial(self._answer, number, finished))

    def _answer(self, number: int, finished: Finished) -> None:
        error = ValueError("bad") if self.bad and number % self.bad == 0 else None
        self.under_way -= 1
        finished(number, self.world.now, error)

    def poll(self) -> None: ...

    def release(self) -> None: ...


CLIENT = Client("none", 0, [()], {"tenant": "somebody"})


def test_latency_counts_from_the_scheduled_time(world: _World) -> None:
    quick = drive(_Slow(world, 0.005), [Traffic(CLIENT, rate=100.0)], Window(0.3, 0.0))
    assert quick.missing == 0 and not quick.errors and quick.requests > 10
    assert 0.005 <= quick.quantile(0.5) <= quick.p99 < 0.0075
    stalled = _Slow(world)
    stalled.stall = 0.2
    found = drive(stalled, [Traffic(CLIENT, rate=100.0)], Window(0.3, 0.0))
    # The server kept the generator for 0.2 s: what was due meanwhile waited, and not for the generator.
    assert found.p99 > 0.1 and found.held > 0.1 and found.lag < 1e-3


def test_a_generator_that_sleeps_too_long_is_late_itself(
    world: _World, monkeypatch: pytest.MonkeyPatch
) -> None:
    naps, sleep = itertools.count(), world.sleep
    late = {20: 0.2}  # the twentieth nap is that long
    monkeypatch.setattr(load.time, "sleep", lambda gap: sleep(late.get(next(naps), gap)))
    found = drive(_Slow(world), [Traffic(CLIENT, rate=100.0)], Window(0.3, 0.0))
    assert found.p99 > 0.1 and found.lag > 0.1 and found.held == 0.0
    # What comes before the window counts for nothing in it.
    naps = itertools.count()
    found = drive(_Slow(world), [Traffic(CLIENT, rate=100.0)], Window(0.3, 0.5))
    assert found.p99 < 1e-2 and found.lag < 1e-2


def test_cpu_time_is_told_by_thread() -> None:
    """Of a server's thread, of its calls on the generator's, and the generator's own."""
    jobs: queue.SimpleQueue[tuple[int, Finished] | None] = queue.SimpleQueue()

    def burn(seconds: float) -> None:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    class Busy(_Slow):
        def submit(self, batch: Sequence[Shot], finished: Finished) -> None:
            for number, _, _ in batch:
                burn(1e-3)
                jobs.put((number, finished))

    def work() -> None:
        while (job := jobs.get()) is not None:
            burn(3e-3)
            job[1](job[0], time.perf_counter(), None)

    thread = threading.Thread(target=work, name="busy-7", daemon=True)
    thread.start()
    found = drive(Busy(_World()), [Traffic(CLIENT, rate=40.0)], Window(0.5, 0.0))
    jobs.put(None)
    thread.join()
    assert 1e-3 <= found.parts["submit"] < 2e-3
    assert 0.0 < found.asleep <= found.cost < 2e-3
    assert found.host > 4e-3
    if Path("/proc/self/task").is_dir():
        assert 3e-3 <= found.parts["busy"] < 4e-3


def test_a_late_generator_sends_all_that_was_due(world: _World) -> None:
    stalled = _Slow(world)
    stalled.stall = 0.5
    found = drive(stalled, [Traffic(CLIENT, rate=200.0)], Window(0.2, 0.0))
    assert found.requests == len(arrivals("poisson", [200.0], 0.2, 1, 0))
    assert found.clients[0].offered == found.requests and found.clients[0].served == 0


def test_what_is_never_answered_is_infinitely_late(world: _World) -> None:
    found = drive(_Slow(world, lost=3), [Traffic(CLIENT, rate=100.0)], Window(0.3, 0.0))
    assert found.missing == 3 and found.p99 == math.inf
    assert found.data()["quantiles"]["p99"] is None


def test_what_fails_is_counted_by_its_error_and_has_no_latency(world: _World) -> None:
    found = drive(_Slow(world, bad=2), [Traffic(CLIENT, rate=100.0)], Window(0.3, 0.0))
    assert found.errors["ValueError"] == (found.requests + 1) // 2
    assert len(found.clients[0].latencies) == found.requests // 2


def test_a_closed_loop_client_has_so_many_under_way_from_when_it_joins(world: _World) -> None:
    server = _Slow(world, 0.02)
    traffics = [Traffic(CLIENT, depth=3), Traffic(CLIENT, depth=1, start=0.25)]
    found = drive(server, traffics, Window(0.2, 0.0))
    assert server.most == 3 and found.clients[1].offered == 0
    assert found.throughput() == pytest.approx(3 / 0.02, rel=0.1)
    assert server.under_way == 0  # the run waited for the last ones


def test_answers_from_another_thread_in_real_time() -> None:
    """The generator naps until one is there."""

    class Threaded(_Slow):
        def submit(self, batch: Sequence[Shot], finished: Finished) -> None:
            for number, _, _ in batch:
                answer = partial(finished, number, time.perf_counter(), None)
                threading.Timer(0.005, answer).start()

    found = drive(Threaded(_World()), [Traffic(CLIENT, depth=2)], Window(0.2, 0.0))
    assert found.missing == 0 and not found.errors and found.requests > 2


def test_the_probe_sees_both_ends_of_the_window(world: _World) -> None:
    moments: list[float] = []
    traffic = [Traffic(CLIENT, rate=50.0)]
    drive(_Slow(world), traffic, Window(0.2, 0.1), probe=lambda: moments.append(world.now))
    begin, end, _ = moments
    assert end - begin == pytest.approx(0.2, abs=5e-3)


def test_the_search_finds_the_edge() -> None:
    def run(rate: float) -> Outcome:
        got = Got(1, 1, (0.002 if rate <= 700.0 else 0.05,), {})
        return Outcome(Window(1.0), (got,), 1, 0.0, 0.0, 0.0)

    best, runs = search(run, 1600.0, 0.01, 10)
    assert len(runs) == 10 and 690.0 < best <= 700.0
    assert search(run, 1600.0, 0.001, 4)[0] == 0.0


@pytest.mark.parametrize(
    ("row", "passed"),
    [
        (Row("least", 1.0, 1.0), True),
        (Row("least", 1.1, 1.0), False),
        (Row("most", 1.1, 1.0, most=False), True),
        (Row("lost", None, 1.0), False),
        (Row("endless", math.inf, 1.0, most=False), False),
        (Row("told", 1.0, None), None),
    ],
)
def test_a_row_passes_only_where_its_target_was_measured_and_met(row: Row, passed: bool | None) -> None:
    assert row.passed is passed
    json.dumps(row.data(), allow_nan=False)


def _replaced(monkeypatch: pytest.MonkeyPatch, **figures: Any) -> None:
    monkeypatch.setattr(serve, "FIGURES", figures)


def test_a_figure_that_fails_is_in_the_table_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "serve.json"
    seen: list[list[str]] = []

    def good(stage: Stage) -> Finding:
        rows = (Row("errors", 1.0, 2.0, unit="%"), Row("speed", 1.0, 2.0, most=False))
        return Finding(rows, {}, ("one",), ("two",))

    def bad(stage: Stage) -> Finding:
        raise RuntimeError("no such luck")

    def last(stage: Stage) -> Finding:
        seen.append(list(json.loads(record.read_text())["figures"]))
        assert state.settings().collector == "idle"
        return Finding((), {})

    _replaced(monkeypatch, bad=bad, good=good, last=last)
    assert serve.main(["--device", "cpu", "--json", str(record)]) == 1
    assert seen == [["bad", "good"]]  # the record is written after each
    assert json.loads(record.read_text())["collector"] == {"mux": "idle", "peers": "off"}
    assert state.settings().collector == "python"
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].endswith("pass") and lines[4].endswith("MISS")
    assert lines[5:] == [
        "bad FAILED: RuntimeError: no such luck",
        "good FAILED: one",
        "good: two",
        "1 targets met, 1 missed; of 3 figures 1 not measured",
    ]
    assert serve.main(["--show", str(record)]) == 1
    assert capsys.readouterr().out.splitlines() == lines


def test_what_the_budget_does_not_reach_is_in_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _replaced(monkeypatch, first=lambda stage: Finding((), {}), second=lambda stage: Finding((), {}))
    assert serve.main(["--device", "cpu", "--budget", "0"]) == 1
    assert capsys.readouterr().out.count("not run: the budget of 0 s was spent") == 2


@pytest.mark.parametrize(
    ("figure", "names"),
    [
        ("knob", {"tiny-cnn": "4 of 64"}),
        ("latency", dict.fromkeys(["tiny-cnn", "tiny-encoder", "tiny-mlp", "tiny-mixer"], "4 of 64")),
        (
            "weights",
            dict.fromkeys(["tiny-cnn@8", "tiny-encoder@8", "tiny-mlp@8", "tiny-mixer@8"], "8 of 8"),
        ),
    ],
)
def test_what_the_figures_serve_is_compiled_ahead(
    figure: str, names: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Any] = []

    def compile_ahead(
        wanted: list[Any], jobs: int, limit: float, flags: list[str], say: Any
    ) -> dict[str, str]:
        asked.append((jobs, limit, flags))
        return {one.label: f"{one.count} of {one.bundle}" for one in wanted}

    monkeypatch.setattr(serve, "compile_ahead", compile_ahead)
    monkeypatch.setattr(serve, "draw", lambda report, path: None)
    _replaced(monkeypatch, **{figure: lambda stage: Finding((), {})})
    record = tmp_path / "serve.json"
    flags = ["--device", "cpu", "--ahead", "3", "--budget", "100", "--servers", "inductor"]
    assert serve.main([*flags, "--json", str(record)]) == 0
    peers = ["--inductor"] if figure == "knob" else []
    assert asked == [(3, 50.0, ["--mux", *peers, "--device=cpu", "--dtype=float32"])]
    assert json.loads(record.read_text())["ahead"]["programs"] == names


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ahead", "-1"], "--ahead must not be negative"),
        (["--figures", "rate,luck"], "unknown figures luck; choose from rate"),
        (["--models", "lenet"], "unknown models lenet"),
        (["--models", "tiny-cnn"], "takes four different workloads, not 1"),
        (["--servers", "mux,tpu"], "unknown servers mux, tpu"),
        (["--tenants", "0"], "at least 4"),
        (["--seconds", "0"], "positive"),
        (["--samples", "0"], "--samples must be at least 1"),
        (["--bound", "soon"], "--bound"),
    ],
)
def test_wrong_arguments_are_named(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        serve.main([*flags, "--device", "cpu"])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_all_sizes_of_the_main_architecture_are_warmed() -> None:
    assert warmed(5, every=True) == [5, 4, 3, 2, 1]
    assert warmed(64, every=True) == list(range(64, 0, -1))
    assert warmed(26, every=False) == [26, 24, 20, *range(16, 0, -1)]


def test_a_run_leaves_nothing_that_the_collector_would_look_through() -> None:
    """Its pauses would be the server's: what is kept of a request are numbers."""

    class Prompt(_Slow):
        def submit(self, batch: Sequence[Shot], finished: Finished) -> None:
            for number, _, _ in batch:
                seen.append(gc.get_count()[0])
                finished(number, time.perf_counter(), None)

    seen: list[int] = []
    gc.disable()
    try:
        gc.collect()
        found = drive(Prompt(_World()), [Traffic(CLIENT, rate=2000.0)], Window(0.5, 0.0))
    finally:
        gc.enable()
    assert found.requests > 500
    assert seen[-1] - seen[0] < 100

"""The serving figures: all of them on tiny models, and the arithmetic behind them."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from torch_mux.bench import plot_serve, serve
from torch_mux.bench.figures import host, knob, mlperf, prediction, shares
from torch_mux.bench.figures import stage as stage_module
from torch_mux.bench.figures.base import Row, cells
from torch_mux.bench.figures.deadlines import bundle_seconds
from torch_mux.bench.figures.oracle import most_in_time
from torch_mux.bench.figures.stage import Stage
from torch_mux.bench.load import Client, Outcome, Traffic, Window
from torch_mux.bench.plot import BEGIN, END
from torch_mux.runtime.timeline import BundleSpan, RequestSpan


def test_one_command_fills_the_whole_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "serve.json"
    flags = ["--device", "cpu", "--quick", "--seconds", "0.25", "--bound", "2s", "--json", str(record)]
    wanted = set(serve.FIGURES)
    if importlib.util.find_spec("mlperf_loadgen") is None:  # there is no wheel for every machine
        wanted.remove("mlperf")
        flags += ["--figures", ",".join(sorted(wanted))]
    assert serve.main(flags) == 0, capsys.readouterr()
    report = json.loads(record.read_text())
    assert set(report["figures"]) == wanted
    for name, found in report["figures"].items():
        assert found["rows"] and not found["errors"], name
        missing = [row["name"] for row in found["rows"] if row["measured"] is None]
        assert not missing or name == "prediction", name  # a run may hold no composition out
    told = capsys.readouterr().out
    assert all(row["name"] in told for _, row in _rows(report["figures"]))
    _check(report["figures"])
    figure = ElementTree.fromstring(record.with_suffix(".svg").read_text())
    assert sum("polyline" in part.tag for part in figure.iter()) >= 10
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    plot_serve.main([str(record), "--page", str(page)])
    filled = page.read_text()
    assert "](serve.svg)" in filled and filled.startswith("before") and filled.endswith("after\n")
    assert all(f"| {name} | {row['name']} |" in filled for name, row in _rows(report["figures"]))


@pytest.mark.gpu
def test_the_peers_answer_the_same_arrivals_on_a_gpu(tmp_path: Path) -> None:
    record = tmp_path / "serve.json"
    models = "tiny-cnn,tiny-encoder,tiny-mlp,tiny-mixer"
    flags = ["--device", "cuda", "--models", models, "--tenants", "4", "--seconds", "0.2", "--quick"]
    assert serve.main([*flags, "--figures", "rate,knob,mix,weights", "--json", str(record)]) == 0
    figures = json.loads(record.read_text())["figures"]
    servers = figures["rate"]["data"]["servers"]
    assert [one["server"] for one in servers] == ["mux", "streams", "sliced"]
    for one in servers:
        assert all(run["missing"] == 0 and not run["errors"] for run in one["runs"])
    assert figures["knob"]["data"]["peer"]["server"] == "streams"
    weighted = figures["weights"]["data"]["an architecture each"]
    assert weighted["samples"] == 8 and min(weighted["device seconds"]) > 0 and not weighted["run"]["errors"]
    mixed = figures["mix"]["data"]["servers"]
    assert [one["server"] for one in mixed] == ["mux", "streams", "sliced"]
    assert all(run["missing"] == 0 and not run["errors"] for one in mixed for run in one["runs"])


def _rows(figures: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, row) for name, found in figures.items() for row in found["rows"]]


def _check(figures: dict[str, Any]) -> None:
    """That runs were what their figures say."""
    servers = figures["rate"]["data"]["servers"]
    assert [one["server"] for one in servers] == ["mux", "inductor"]
    assert all(one["closed loop"] > 0 and one["runs"] for one in servers)
    mixed = figures["mix"]["data"]
    assert len(set(mixed["models"])) == 4 and figures["rate"]["data"]["models"] == mixed["models"][:1]
    assert [one["server"] for one in mixed["servers"]] == ["mux", "inductor"]
    for one in mixed["servers"]:
        assert one["closed loop"] > 0
        assert all(run["missing"] == 0 and not run["errors"] for run in one["runs"])
    assert "4000 ms" in figures["mix"]["rows"][0]["name"], "twice the bound of one architecture"
    equal = figures["shares"]["data"]
    assert len(set(equal["models"])) == 4 and min(equal["device seconds"]) > 0
    assert equal["samples"] == 8 and all(name.endswith("@8") for name in equal["models"])
    assert len(figures["latency"]["data"]["pairs"]) == 6
    beside = figures["aggressor"]["data"]
    assert beside["without"]["answered"] > 0 and beside["beside"]["requests"] > beside["without"]["requests"]
    met = figures["deadlines"]["data"]
    assert 0 < met["in time"] <= met["oracle"] <= met["arrivals"]
    ends = met["outcomes"]
    kinds = ("ok", "late", "expired", "cancelled", "errors")
    assert ends["accepted"] == sum(ends[kind] for kind in kinds)
    run = figures["host"]["data"]["run"]
    assert 0 < run["parts"]["submit"] < run["host"] and 0 < run["asleep"] < run["generator"]
    saved = figures["knob"]["data"]
    for curve, setting in ((saved["points"], "max_bundle"), (saved["waits"]["points"], "max_wait")):
        assert [one[setting] for one in curve] == sorted(one[setting] for one in curve)
        assert all(one["throughput"] > 0 and one["p99"] > 0 for one in curve) and len(curve) == 2
    assert saved["peer"]["throughput"] > 0 and saved["waits"]["peer"]["p99"] > 0


@pytest.fixture(params=range(60), ids=str)
def trace(request: pytest.FixtureRequest) -> tuple[list[float], float, list[float]]:
    """Arrivals, deadline and seconds of bundles, drawn at random."""
    draw = random.Random(request.param)
    arrivals = sorted(draw.uniform(0, 6) for _ in range(draw.randint(1, 7)))
    seconds = sorted(draw.uniform(0.3, 2.5) for _ in range(draw.randint(1, 3)))
    return arrivals, draw.uniform(0.4, 3.0), seconds


def _feasible(arrivals: Sequence[float], deadline: float, seconds: Sequence[float], free: float) -> bool:
    """Whether all of these can be served in time, by trying every first bundle, of any of them."""
    if not arrivals:
        return True
    places = range(len(arrivals))
    for size in range(1, min(len(arrivals), len(seconds)) + 1):
        for bundle in combinations(places, size):
            end = max(free, *(arrivals[place] for place in bundle)) + seconds[size - 1]
            if end <= min(arrivals[place] for place in bundle) + deadline:
                left = [arrivals[place] for place in places if place not in bundle]
                if _feasible(left, deadline, seconds, end):
                    return True
    return False


def test_the_oracle_serves_as_many_as_any_schedule(trace: tuple[list[float], float, list[float]]) -> None:
    arrivals, deadline, seconds = trace
    best = max(
        count
        for count in range(len(arrivals) + 1)
        for kept in combinations(arrivals, count)
        if _feasible(kept, deadline, seconds, 0.0)
    )
    assert most_in_time(arrivals, deadline, seconds) == best


def test_the_oracle_drops_many_where_it_must() -> None:
    # One a second of 400 that come in 4 s, and nobody waits: four, or five where the last begins at the end.
    arrivals = [number / 100 for number in range(400)]
    assert most_in_time(arrivals, 1.0, [1.0]) == 4


def _span(slots: int, issued: float, seconds: float, program: str = "a", lane: int = 0) -> BundleSpan:
    requests = (RequestSpan("tenant", issued, "done", False),) * slots
    return BundleSpan(program, program, "cpu", lane, 1.0, issued, issued + seconds, seconds, requests)


def test_the_oracle_is_never_slower_with_fewer_requests() -> None:
    spans = [_span(1, 0.0, 0.5), _span(2, 1.0, 0.4), _span(4, 2.0, 0.8)]
    assert bundle_seconds(spans, 5) == pytest.approx([0.4, 0.4, 0.6, 0.8, 1.0])


def test_held_out_compositions_are_predicted_from_the_others_before_them() -> None:
    linear = [_span(1 + n % 8, float(n), 1e-3 * (1 + n % 8)) for n in range(400)]
    found = prediction.replay(linear, seed=3, since=100.0)
    assert len(found["held out"]) + len(found["seen"]) == 300
    assert prediction._within(found["seen"]) == 100.0
    # Times in proportion to the slots are interpolated exactly; below the smallest size they are not.
    exact = [pair for pair in found["held out"] if pair[0] == pytest.approx(pair[1])]
    assert len(exact) >= len(found["held out"]) / 2 > 0
    jump = [*linear[:200], *(_span(1 + n % 8, float(n), 2e-3 * (1 + n % 8)) for n in range(200, 400))]
    late = prediction.replay(jump, seed=3, since=200.0)
    assert (prediction._within(late["seen"]) or 0.0) < 100.0  # what comes later is not known before


def test_a_composition_counts_the_bundles_under_way_on_other_lanes() -> None:
    spans = [_span(1, 0.0, 1.0), _span(1, 0.5, 1.0, lane=1), _span(1, 0.7, 1.0, lane=1), _span(1, 1.2, 1.0)]
    assert [where[1] for _, _, where in prediction.compositions(spans)] == [0, 1, 1, 2]


def test_bundles_that_no_other_was_beside_are_told_apart() -> None:
    spans = [
        _span(1, 0.0, 1.0),
        _span(1, 0.5, 1.0),  # waits for the first on its lane
        _span(1, 1.2, 0.2, lane=1),
        _span(1, 3.0, 1.0),
        _span(1, 3.9, 1.0, lane=1),
        _span(1, 6.0, 1.0),
    ]
    spans[1] = replace(spans[1], ended=2.0)
    assert prediction.by_themselves(spans) == {0, 5}
    elsewhere = [replace(span, device=f"cuda:{index}") for index, span in enumerate(spans)]
    assert prediction.by_themselves(elsewhere) == set(range(6))


def test_how_near_a_median_comes_is_told_of_compositions_with_several_bundles() -> None:
    spans = [_span(2, float(n), 1.0 if n % 4 else 2.0) for n in range(8)] + [_span(1, 9.0, 0.5)]
    pairs = prediction.scattered(spans)
    assert sorted(pairs) == [(1.0, 1.0)] * 6 + [(1.0, 2.0)] * 2
    assert prediction._within(pairs) == 75.0
    assert prediction.scattered(spans, since=6.5) == []


def test_the_worst_share_is_that_of_the_weights() -> None:
    assert shares._worst({"device seconds": [1.0, 2.0, 4.0, 8.0]}) == pytest.approx(0.0)
    assert shares._worst({"device seconds": [2.0, 1.0, 4.0, 8.0]}) == pytest.approx(100.0)


def test_shares_of_a_device_that_rests_miss_their_target() -> None:
    equal = {"device seconds": [1.0, 1.0], "busy": 0.5}
    row = Row("shares", 0.0, 2.0, void=shares._idle(equal))
    assert row.passed is False and cells("shares", row.data())[-1] == "MISS, not saturated"
    assert Row("shares", 0.0, 2.0, void=shares._idle(equal | {"busy": 0.95})).passed


def test_traffic_is_settled_once_a_kind_until_nothing_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    jobs = iter([0, 0, 3, 3, 5, 5, 5, 5])  # begun; before and after each load; done
    monkeypatch.setattr(stage_module, "_jobs", lambda: next(jobs))
    monkeypatch.setattr(stage_module, "drive", lambda server, traffics, *_, **__: runs.append(len(traffics)))
    stage = Stage(SimpleNamespace(process="poisson", seed=0))
    client = Client("tiny", 0, (), {"tenant": "a"})
    stage.settle([Traffic(client, rate=1.0)])
    stage.settle([Traffic(client, depth=4), Traffic(client, rate=2.0)])
    gc.unfreeze()
    assert runs == [1, 1, 1]
    (phase,) = stage.settling
    assert phase["jobs"] == 5 and phase["quiet"] and phase["workloads"] == ["tiny"]
    assert serve._warmth(stage.settling)[0].endswith("with 5 compiles and captures")


def test_a_run_beside_a_capture_is_measured_again_when_that_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, graphs = iter([0, 2, 2, 2, 2, 3]), iter([{"a"}, {"a", "b", "c"}, {"a"}, {"a"}, {"a"}])
    log: list[object] = []

    def drive(server: object, traffics: Sequence[Traffic], window: Window, **_: Any) -> Outcome:
        log.append("run")
        return Outcome(window, (), log.count("run"), 0.0, 0.0, 0.0)

    monkeypatch.setattr(stage_module, "drive", drive)
    monkeypatch.setattr(stage_module, "_jobs", lambda: next(jobs))
    monkeypatch.setattr(stage_module, "_graphs", lambda: next(graphs))
    monkeypatch.setattr(stage_module, "_quiesce", lambda: log.append("quiet"))
    monkeypatch.setattr(Stage, "settle", lambda *_: None)
    stage = Stage(SimpleNamespace(process="poisson", seed=0, seconds=1.0))
    traffic = [Traffic(Client("tiny", 0, (), {"tenant": "a"}), rate=1.0)]
    again = stage.drive(traffic)
    assert log == ["run", "quiet", "run"]
    assert (again.requests, again.jobs, again.disturbed) == (2, 0, 2)
    assert again.data()["disturbed"] == 2 and again.data()["captured"] == ["b", "c"]
    # What wrote something down captured nothing.
    assert stage.drive(traffic).jobs == 1 and log == ["run", "quiet", "run", "run"]


def test_graphs_are_told_by_program_size_and_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = SimpleNamespace(name="Net", captured=((1, 8), (), (2,)))
    members = (("A", 2), ("B", 4))
    mixes = SimpleNamespace(members=members, words="[A B]"), SimpleNamespace(members=members[:1], words="")
    engine = SimpleNamespace(plans=lambda: (plan,), mixes=lambda: mixes)
    monkeypatch.setattr(stage_module.state, "peek", lambda: engine)
    sizes = {"Net, 1 slots, lane 0", "Net, 8 slots, lane 0", "Net, 2 slots, lane 2"}
    assert stage_module._graphs() == sizes | {f"mix of {members}"}


def test_nothing_is_collected_while_a_peer_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def drive(server: object, traffics: Sequence[Traffic], window: Window, **_: Any) -> Outcome:
        seen.append(gc.isenabled())
        return Outcome(window, (), 0, 0.0, 0.0, 0.0)

    monkeypatch.setattr(stage_module, "drive", drive)
    monkeypatch.setattr(Stage, "settle", lambda *_: None)
    stage = Stage(SimpleNamespace(process="poisson", seed=0, seconds=1.0))
    stage._peers["peer", ("tiny",)] = stage.mux
    traffic = [Traffic(Client("tiny", 0, (), {"tenant": "a"}), rate=1.0)]
    stage.drive(traffic, server="peer")
    stage.drive(traffic)
    assert seen == [False, True] and gc.isenabled()


def test_a_step_of_the_curve_gives_latency_for_throughput_or_it_does_not_count() -> None:
    def curve(*points: tuple[float | None, float | None]) -> list[dict[str, float | None]]:
        return [{"throughput": throughput, "p99": p99} for throughput, p99 in points]

    assert knob.rises(curve((100.0, 1.0), (200.0, 2.0), (196.0, 3.0), (300.0, 2.9))) == 100.0
    assert knob.rises(curve((100.0, 1.0), (200.0, 0.5))) == 0.0, "the first was worse at both"
    assert knob.rises(curve((100.0, 1.0), (101.0, 0.99))) == 0.0, "the setting did nothing"
    assert knob.rises(curve((100.0, 1.0), (200.0, None), (300.0, 3.0), (400.0, 3.0))) == pytest.approx(
        100 / 3
    )


def test_a_decision_of_the_policy_takes_time() -> None:
    assert 0.0 < host.decision_seconds(64, 2, rounds=20) < 1e-3


def test_a_missing_load_generator_is_told_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.import_module

    def missing(name: str, package: str | None = None) -> Any:
        if name != "mlperf_loadgen":
            return found(name, package)
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert serve.main(["--device", "cpu", "--figures", "mlperf"]) == 1
    assert "pip install 'torch-mux[bench]'" in capsys.readouterr().out


def test_the_summary_of_the_load_generator_is_read() -> None:
    text = "=====\nResult is : VALID\n  Min duration : Yes\n99.00 percentile latency (ns)   : 2768089\n"
    assert mlperf.summary(text)["Result is"] == "VALID"
    assert mlperf.summary(text)["99.00 percentile latency (ns)"] == "2768089"

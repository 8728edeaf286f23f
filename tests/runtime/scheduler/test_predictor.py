"""Forecasts of bundle times: quantiles, interpolation, outliers, contexts, and what is kept on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_mux.runtime.forecasts import Forecasts
from torch_mux.runtime.scheduler.predictor import Predictor, context

ALONE = (16, 0)
CPU = torch.device("cpu")


def learned(sizes: dict[int, float], where: tuple[int, int] = ALONE, times: int = 4) -> Predictor:
    predictor = Predictor()
    for slots, seconds in sizes.items():
        for _ in range(times):
            predictor.observe("a", slots, where, seconds)
    return predictor


@given(st.lists(st.floats(1e-6, 10.0), min_size=5, max_size=100))
def test_quantiles_of_the_last_bundles(seconds: list[float]) -> None:
    predictor = Predictor()
    for one in seconds:
        predictor.observe("a", 4, ALONE, one)
    window = sorted(seconds[1:][-32:])
    forecast = predictor.forecast("a", 4, ALONE)
    assert sum(one <= forecast.median for one in window) >= len(window) / 2
    assert sum(one < forecast.median for one in window) <= len(window) / 2
    assert sum(one <= forecast.high for one in window) >= 0.9 * len(window)
    assert forecast.known


def test_a_straggler_changes_nothing() -> None:
    predictor = learned({4: 1e-3}, times=20)
    for _ in range(2):
        predictor.observe("a", 4, ALONE, 10.0)
    assert predictor.forecast("a", 4, ALONE).high == 1e-3


def test_a_program_that_turns_slow_is_noticed() -> None:
    predictor = learned({4: 1e-3}, times=32)
    for _ in range(17):
        predictor.observe("a", 4, ALONE, 2e-3)
    assert predictor.forecast("a", 4, ALONE).median == 2e-3


def test_the_first_bundle_counts_until_there_is_a_second() -> None:
    predictor = Predictor()
    predictor.observe("a", 1, ALONE, 60.0)
    assert (predictor.forecast("a", 1, ALONE).median, predictor.forecast("a", 1, ALONE).known) == (
        60.0,
        False,
    )
    predictor.observe("a", 1, ALONE, 1e-3)
    assert predictor.forecast("a", 1, ALONE).high == 1e-3


@given(st.dictionaries(st.integers(1, 64), st.floats(1e-5, 1.0), min_size=1), st.integers(1, 128))
def test_unseen_sizes_lie_between_their_neighbours(sizes: dict[int, float], slots: int) -> None:
    found = learned(sizes).forecast("a", slots, ALONE).median
    below = [size for size in sizes if size <= slots]
    above = [size for size in sizes if size >= slots]
    if not above:
        assert found == pytest.approx(sizes[max(sizes)] * slots / max(sizes))
    elif not below:
        assert found == sizes[min(sizes)]
    else:
        ends = sorted((sizes[max(below)], sizes[min(above)]))
        assert ends[0] * (1 - 1e-9) <= found <= ends[1] * (1 + 1e-9)


def test_caps_and_neighbours_are_told_apart() -> None:
    predictor = learned({1: 1e-3})
    for _ in range(4):
        predictor.observe("a", 1, context(0.25, 0), 3e-3)
        predictor.observe("a", 1, context(1.0, 2), 2e-3)
    found = [
        predictor.forecast("a", 1, context(share, neighbours)).median
        for share, neighbours in ((1.0, 0), (0.25, 0), (0.3, 0), (1.0, 2), (0.25, 2), (1.0, 5))
    ]
    assert found == pytest.approx([1e-3, 3e-3, 3e-3 * 4 / 5, 2e-3, 2e-3, 2e-3])


def test_an_unknown_program_costs_a_millisecond_a_slot() -> None:
    forecast = Predictor().forecast("a", 3, ALONE)
    assert (forecast.median, forecast.known) == (3e-3, False)
    predictor = learned({1: 1.0})
    predictor.forget("a")
    assert not predictor.forecast("a", 1, ALONE).known


def test_what_was_measured_is_there_for_the_next_process(tmp_path: Path) -> None:
    first = Forecasts(tmp_path)
    predictor = first.predictor(CPU)
    for number in range(40):
        predictor.observe("a", 4, context(0.5, 1), 1e-3 * (1 + number % 10))
    before = predictor.forecast("a", 4, context(0.5, 1))
    first.save()
    second = Forecasts(tmp_path)
    other = second.predictor(CPU)
    after = other.forecast("a", 4, context(0.5, 1))
    assert after.known
    assert after.median == pytest.approx(before.median, rel=0.25)
    assert after.high == pytest.approx(before.high, rel=0.15)
    other.observe("b", 1, ALONE, 1e-3)
    second.save()
    kept = json.loads(next(tmp_path.glob("*.json")).read_text())["programs"]
    assert sorted(kept) == ["a", "b"]
    assert len(kept["a"]["8,1"]["4"]) == 8
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": 1, "programs": {"a": {"x": {}}}}',
        '{"format": 1, "programs": {"a": {"16,0": {"1": [-1]}}}}',
        '{"format": 1, "programs": []}',
    ],
)
def test_a_damaged_file_is_done_without(tmp_path: Path, text: str) -> None:
    forecasts = Forecasts(tmp_path)
    path = forecasts._path(CPU)
    assert path is not None
    path.write_text(text)
    predictor = forecasts.predictor(CPU)
    assert not predictor.forecast("a", 1, ALONE).known
    predictor.observe("a", 1, ALONE, 1e-3)
    forecasts.save()
    assert Forecasts(tmp_path).predictor(CPU).forecast("a", 1, ALONE).median == 1e-3


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "file").write_text("")
    forecasts = Forecasts(tmp_path / "file")
    forecasts.predictor(CPU).observe("a", 1, ALONE, 1e-3)
    forecasts.save()
    assert "not kept" in caplog.text


def test_an_engine_keeps_its_forecasts_when_it_closes(lab: Any, tmp_path: Path) -> None:
    engine, program = lab.engine(), lab.program()
    engine._forecasts = Forecasts(tmp_path)
    for _ in range(3):
        lab.call(engine, program, lab.Affine())
    engine.close()
    kept = json.loads(next(tmp_path.glob("*.json")).read_text())["programs"]
    assert len(kept["print-affine"]["16,0"]["1"]) == 2

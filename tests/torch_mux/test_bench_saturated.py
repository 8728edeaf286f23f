"""Figures of a saturated device, on one that only takes time: they tell a right policy from a wrong one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from simulated_gpu import Timing, simulated_engine

import torch_mux
from torch_mux import compat, state
from torch_mux.bench.figures import knob, shares
from torch_mux.bench.figures import stage as stages
from torch_mux.bench.figures.base import Finding
from torch_mux.bench.figures.stage import Options, Stage
from torch_mux.bench.load import Finished, Shot
from torch_mux.runtime.scheduler.fair import Account

MODELS = ("tiny-cnn", "tiny-encoder", "tiny-mlp", "tiny-mixer")
#: Device seconds of a request, by the model's class; more than it costs any host.
SLOTS = {"TinyCNN": 250e-6, "TensorOnly": 400e-6, "TinyMLP": 200e-6, "TinyMixer": 300e-6}
OPTIONS = Options(
    models=MODELS,
    tenants=4,
    device=torch.device("cpu"),
    dtype=torch.float32,
    servers=("prompt",),
    process="poisson",
    bound=1.0,
    seconds=0.6,
    steps=5,
    rate=50.0,
    seed=0,
    samples=2,
)


@pytest.fixture
def staged() -> Iterator[Callable[[float], Stage]]:
    """Makes a stage of a device that takes so many times ``SLOTS``."""
    torch_mux.reset()
    compat.native.build()
    made: list[Stage] = []
    times = [1.0]
    timing = Timing(
        bundle=lambda name, slots: times[0] * (0.5e-3 + SLOTS[name] * slots),
        enqueue=6e-6,
        capture=1e-4,
        launches=1e-4,
        snapshot=1e-6,
    )

    def make(factor: float, options: Options = OPTIONS) -> Stage:
        times[0] = factor
        made.append(Stage(options))
        return made[-1]

    with simulated_engine(timing, pack_after=0.0) as (engine, _):
        state._state.engine, state._state.settings = engine, engine.settings
        yield make
        for stage in made:
            stage.close()
    torch_mux.reset()


def _shared(staged: Any) -> tuple[Finding, Finding]:
    """Both figures, of a device that is slow enough for a host that has other things to do."""
    for factor in (1.0, 3.0, 9.0):
        stage = staged(factor, replace(OPTIONS, seconds=factor * OPTIONS.seconds))
        found = shares.measure(stage), shares.measure_weights(stage)
        if not any(row.void for one in found for row in one.rows):
            break
        stage.close()
    return found


def test_shares_and_weights_of_a_saturated_device_are_those_granted(staged: Any) -> None:
    equal, weighted = _shared(staged)
    assert [row for row in (*equal.rows, *weighted.rows) if row.passed is False] == []
    assert all("requests of 2" in row.name and row.measured >= 90.0 for row in equal.rows[1:])
    assert equal.data["models"] == [f"{name}@2" for name in MODELS] and equal.data["samples"] == 2


def test_a_policy_that_charges_nobody_misses(staged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Account, "charge", lambda self, amount: None)
    # With a lane an architecture, which are busy all the time, each has a quarter whoever goes first.
    torch_mux.configure(branches=1)
    equal, weighted = _shared(staged)
    missed = [row for row in (*equal.rows, *weighted.rows) if row.bound is not None]
    assert [(row.passed, row.void) for row in missed] == [(False, "")] * 3
    assert all(row.measured > 10.0 for row in missed)


def test_a_device_that_waits_for_its_host_makes_shares_void(staged: Any) -> None:
    found = shares.measure(staged(0.01))
    assert found.rows[0].void == "not saturated" and found.rows[0].passed is False


class Prompt:
    """A peer that answers at once; paced, so that it leaves the interpreter to others."""

    name = "prompt"
    polled = True

    def __init__(self, groups: object) -> None:
        self._pending: list[tuple[int, Finished]] = []

    def submit(self, batch: Sequence[Shot], finished: Finished) -> None:
        self._pending += [(shot.number, finished) for shot in batch]

    def poll(self) -> None:
        ended, self._pending = self._pending[:16], self._pending[16:]
        for number, finished in ended:
            finished(number, time.perf_counter(), None)

    def release(self) -> None: ...


KNOB = replace(OPTIONS, seconds=0.6, steps=4)


def test_either_setting_gives_latency_for_throughput(staged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(stages.PEERS, "prompt", Prompt)
    stage = staged(2.0, KNOB)
    most, under = stage.most, list[int]()
    monkeypatch.setattr(stage, "most", lambda: (under.append(state.settings().max_bundle), most())[1])
    found = knob.measure(stage)
    assert under[0] == 64, "what all settings are asked a part of is measured under none of them"
    assert [row.measured for row in found.rows[:2]] == [100.0, 100.0]
    assert [point["max_bundle"] for point in found.data["points"]] == [8, 32]
    assert found.data["peer"]["server"] == found.data["waits"]["peer"]["server"] == "prompt"


def test_settings_that_work_the_wrong_way_make_no_curve(staged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {8: 32, 32: 8, 0.0: 4e-3, 4e-3: 0.0}

    def swapped(**settings: float) -> Any:
        return stages.configured(**{name: other[value] for name, value in settings.items()})

    monkeypatch.setitem(stages.PEERS, "prompt", Prompt)
    monkeypatch.setattr(knob, "configured", swapped)
    found = knob.measure(staged(2.0, KNOB))
    assert [(row.measured, row.passed) for row in found.rows[:2]] == [(0.0, False)] * 2

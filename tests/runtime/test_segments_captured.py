"""Capturing plans in segments, with the driver played by fakes: what a graph has, and which is used."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_mux import compat
from torch_mux.lowering.kernels.common import Launch
from torch_mux.lowering.kernels.linear import linear_launch
from torch_mux.runtime.executors import capture
from torch_mux.runtime.executors.capture import Capturer, Steps
from torch_mux.runtime.executors.segmenter import Segmenter
from torch_mux.runtime.lanes import Lane
from torch_mux.runtime.ring import TableRing
from torch_mux.runtime.scheduler.base import LaneKind
from torch_mux.settings import Settings

CPU, HALF = torch.device("cpu"), torch.float16


class Place:
    """A capturer, and lanes without streams."""

    def __init__(self, lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.jobs: list[Any] = []
        self.meanwhile: list[Any] = []
        side = SimpleNamespace(stream=SimpleNamespace(synchronize=lambda: None))
        monkeypatch.setattr(capture, "Side", lambda device: side)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: side.stream)
        monkeypatch.setattr(compat, "Pool", lambda device: "pool")
        monkeypatch.setattr(compat, "captured", self._captured)
        monkeypatch.setattr(Launch, "start", lambda launch: self._start(launch))
        monkeypatch.setattr(Launch, "build", lambda launch: None)
        steps: Any = Steps(lab.stack, lambda *_: None, lambda *_: None)
        thread: Any = SimpleNamespace(
            submit=lambda job, rank=None: self.jobs.append(job),
            holds_back=lambda all_sizes: None,
            breathe=lambda: None,
        )
        builder: Any = SimpleNamespace(finish=lambda launches: None)
        self.segmenter = Segmenter(CPU, 132)
        self.capturer = Capturer(thread, steps, threading.RLock(), builder, self.segmenter)
        engine = lab.engine()
        program = lab.program()
        engine.register(program)
        assert engine.quiesce(10)
        self.served = engine._served[program.fingerprint]

    def _start(self, launch: Launch) -> None:
        kernel = launch.kernel.fn.__name__
        flag = {0: " begins", 1: " ends"}.get(launch.arguments.get("ENDS", -1), "")
        self.log.append(f"{kernel.removesuffix('_kernel')}{flag}")

    def _captured(self, run: Any, pool: Any) -> str:
        self.log.clear()
        run()
        for change in self.meanwhile:
            change()
        return "graph"

    def lane(self, kind: LaneKind) -> Lane:
        lane: Any = Lane.__new__(Lane)
        lane.kind, lane.index, lane.number, lane.context, lane.pool = kind, 0, hash(kind), None, None
        lane._recorder = SimpleNamespace(stream=None)
        lane.executables, lane.pool_bytes = {}, 0
        lane.ring = TableRing(2, 256, CPU)
        lane.measure_pool = lambda: None
        made: Lane = lane
        return made

    def graph(self, lane: Lane, slots: int = 2) -> Any:
        """The graph to use for a bundle, and what was captured for it if it had to be."""
        self.log.clear()
        generation = self.capturer.generation(self.served)
        if lane.executable(self.served.key, slots, generation) is None:
            self.capturer.want(lane, self.served, slots, fits=False)
            while self.jobs:
                self.jobs.pop(0)()
        return lane.executable(self.served.key, slots, generation)


@pytest.fixture
def place(lab: Any, monkeypatch: pytest.MonkeyPatch) -> Place:
    made = Place(lab, monkeypatch)
    launching(made.served.compiled, [64, 4096, 4096, 64])
    return made


def launching(plan: Any, rows: Sequence[int]) -> None:
    """Has a plan launch linear layers of so many rows."""

    def run(rows_of: Tensor, control: Tensor, inputs: list[Tensor]) -> list[Tensor]:
        slots = rows_of.shape[0]
        table = torch.zeros(4, 1, dtype=torch.int64)
        for m in rows:
            x, out = torch.empty(slots, m, 1024, dtype=HALF), torch.empty(slots, m, 1024, dtype=HALF)
            linear_launch(x, table, 0, rows_of, control, out, n=1024, k=1024, sms=132).run()
        return [inputs[0], inputs[0]]

    plan.run = run


def test_a_graph_of_each_lane_has_what_its_kind_needs(place: Place) -> None:
    plain = ["linear"] * 4
    assert place.graph(place.lane(LaneKind.COMMON)).segments == 1
    assert place.log == plain
    place.capturer.configure(Settings(segment=60e-6, isolation="caps"))
    graph = place.graph(place.lane(LaneKind.COMMON))
    # Some 4 and 40 us by estimate, and half of the bound may be filled.
    assert place.log == ["stop", "linear", "stop", "linear", "stop", "linear", "stop", "linear"]
    assert graph.segments == 4
    place.graph(place.lane(LaneKind.PASSING))
    assert place.log == ["count begins", *plain, "count ends"]
    place.graph(place.lane(LaneKind.RESERVED))
    assert place.log == ["claim begins", *plain, "claim ends"]
    place.capturer.configure(Settings(segment=1.0, isolation="off"))
    assert place.graph(place.lane(LaneKind.COMMON)).segments == 1
    assert place.log == ["stop", *plain]


def test_settings_that_change_have_graphs_captured_again_and_old_ones_are_not_used(place: Place) -> None:
    lane = place.lane(LaneKind.COMMON)
    first = place.graph(lane)
    place.capturer.configure(Settings(segment=60e-6))
    second = place.graph(lane)
    assert second is not first and second.segments == 4
    assert place.graph(lane) is second
    place.capturer.configure(Settings(segment=60e-6, max_bundle=3))
    assert place.graph(lane) is second


def test_a_setting_that_changes_while_a_graph_is_captured_finds_it_old(place: Place) -> None:
    lane = place.lane(LaneKind.COMMON)
    place.meanwhile = [lambda: place.capturer.configure(Settings(segment=60e-6))]
    assert place.graph(lane) is not None, "it is that of the settings that were asked for"
    place.meanwhile = []
    generation = place.capturer.generation(place.served)
    assert lane.executable(place.served.key, 2, generation) is None
    assert place.graph(lane).segments == 4

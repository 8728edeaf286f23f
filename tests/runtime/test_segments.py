"""Captured plans in segments: where they are cut, who goes first between two, and what he is charged."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from clocks import Told
from hypothesis import given
from hypothesis import strategies as st
from slow_device import slow

from torch_mux.lowering.kernels.interception import Turn, handed
from torch_mux.lowering.kernels.operation import Operation
from torch_mux.runtime.executors.segmenter import Cuts, Segmenter, cut, cut_members
from torch_mux.runtime.ring import TableLayout
from torch_mux.runtime.scheduler.base import LaneKind, lane_kinds
from torch_mux.settings import Settings
from torch_mux.types import Quota

HIGH = Quota("high", priority=1)
CPU = torch.device("cpu")
LAYOUT = TableLayout(2, 1, 1)


class Word:
    """A launch that notes that it was started."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def start(self) -> None:
        self.log.append(self.name)


class Gates:
    """Stands for the words on the device."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def stop(self, control: torch.Tensor, own: torch.Tensor) -> Word:
        assert (control.data_ptr() + 8, control.numel()) == (own.data_ptr(), own.numel())
        return Word(self.log, "stop")

    def overtake(self, ends: bool) -> Word:
        return Word(self.log, "ends" if ends else "begins")

    def claim(self, control: torch.Tensor, ends: bool) -> Word:
        return Word(self.log, "gives back" if ends else "claims")


def segmenter(log: list[str], **settings: Any) -> Segmenter:
    made: Any = Segmenter(CPU, 132)
    made.configure(Settings(**settings))
    made._gate = Gates(log)
    made._seconds = lambda work: work.operation.sizes[0][0] * 1e-6
    return made


def launch(log: list[str], microseconds: int) -> None:
    work: Any = Turn(Operation("linear", ((microseconds, 1, 1),), torch.float16))
    assert handed(work) is work, "the launch itself is what it was"
    log.append(str(microseconds))


def captured(kind: LaneKind, times: list[int], **settings: Any) -> list[str]:
    log: list[str] = []
    with cut(segmenter(log, **settings), kind, LAYOUT, torch.zeros(LAYOUT.words, dtype=torch.int64)):
        for each in times:
            launch(log, each)
    return log


@given(times=st.lists(st.floats(1e-6, 3e-3), max_size=60), bound=st.floats(1e-4, 1e-2))
def test_no_segment_is_longer_than_its_bound_unless_it_is_one_launch(
    times: list[float], bound: float
) -> None:
    log: list[str] = []
    left = iter(times)
    cuts = Cuts(bound, lambda work: next(left), lambda: Word(log, "stop"))  # type: ignore[arg-type,return-value]
    segments: list[list[float]] = []
    for seconds in times:
        before = len(log)
        cuts.before(None)  # type: ignore[arg-type]
        if len(log) > before:
            segments.append([])
        segments[-1].append(seconds)
    assert [seconds for segment in segments for seconds in segment] == times
    assert all(sum(segment) <= bound / 2 or len(segment) == 1 for segment in segments)
    assert cuts.count == len(segments) == len(log)
    # None is cut too early.
    for one, other in pairwise(segments):
        assert sum(one) + other[0] > bound / 2


def test_each_kind_of_lane_has_its_own_launches_around_the_plan() -> None:
    times = [300, 300, 600, 1500, 10]
    whole = [str(each) for each in times]
    cut_up = ["stop", "300", "300", "stop", "600", "stop", "1500", "stop", "10"]
    assert captured(LaneKind.COMMON, times) == whole
    for isolation in ("off", "priority", "caps"):
        settings = {"segment": 2e-3, "isolation": isolation}
        assert captured(LaneKind.COMMON, times, **settings) == cut_up
        assert captured(LaneKind.PASSING, times, **settings) == ["begins", *whole, "ends"]
        claims = isolation == "caps"
        reserved = ["claims", *whole, "gives back"] if claims else whole
        assert captured(LaneKind.RESERVED, times, **settings) == reserved


def test_members_of_a_mix_are_cut_each_by_himself(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    streams: Any = ["first", "second"]
    current: list[str] = []

    class Entered:
        def __init__(self, stream: str) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            current.append(self.stream)

        def __exit__(self, *_: object) -> None:
            current.pop()

    monkeypatch.setattr(torch.cuda, "stream", Entered)
    made = segmenter(log, segment=2e-3)
    stops: list[tuple[str, str]] = []
    monkeypatch.setattr(Word, "start", lambda self: stops.append((self.name, current[-1])))
    tables = [torch.zeros(LAYOUT.words, dtype=torch.int64) for _ in range(2)]
    seen: list[tuple[Any, ...]] = []

    def issuer(members: Any, works: Any, sms: int, beside: bool) -> Any:
        seen.append((tuple(members), sms, beside))
        return works

    issue = cut_members(made, issuer, [LAYOUT] * 2, tables, streams)
    long: Any = Turn(Operation("linear", ((900, 1, 1),), torch.float16))
    short: Any = Turn(Operation("linear", ((100, 1, 1),), torch.float16))
    issue([0, 1], [long, short], 132, False)
    issue([0], [long], 66, True)
    issue([1], [long], 66, True)
    assert stops == [("stop", "first"), ("stop", "second"), ("stop", "first")]
    assert seen == [((0, 1), 132, False), ((0,), 66, True), ((1,), 66, True)]
    assert cut_members(None, issuer, [], [], []) is issuer


def test_graphs_of_other_settings_are_not_used() -> None:
    made = Segmenter(CPU, 132)
    stamps = []
    for settings in (
        Settings(),
        Settings(segment=2e-3),
        Settings(segment=1e-3),
        Settings(segment=1e-3, isolation="off"),
        Settings(segment=1e-3, isolation="green"),
    ):
        made.configure(settings)
        stamps.append(made.stamp)
    assert len(set(stamps)) == 4 and stamps[4] == stamps[0]
    made.configure(Settings(max_bundle=3, isolation="off"))
    assert made.stamp == stamps[0], "without segments nothing is captured anew"


def test_the_lane_that_overtakes_is_there_with_segments_only() -> None:
    kinds = {
        isolation: lane_kinds(Settings(isolation=isolation, segment=1e-3)) for isolation in ("off", "caps")
    }
    assert kinds["off"] == (LaneKind.COMMON, LaneKind.PASSING)
    assert kinds["caps"] == (LaneKind.COMMON, LaneKind.RESERVED, LaneKind.PASSING)
    assert LaneKind.PASSING not in lane_kinds(Settings(isolation="green", segment=1e-3))
    assert LaneKind.PASSING not in lane_kinds(Settings())


@pytest.mark.parametrize("isolation", ["off", "caps"])
def test_a_higher_class_goes_out_at_once_while_the_lane_is_full_of_long_bundles(
    lab: Any, isolation: str
) -> None:
    clock = Told()
    engine, device = slow(lab, clock, max_bundle=1, in_flight=2, segment=0.01, isolation=isolation)
    program, model = lab.program(), lab.Affine(3.0)
    device.seconds = 0.4
    lab.submit(engine, program, model).result()
    clock.runs_until(lambda: not device.flying(), 0.1)
    requests = [lab.submit(engine, program, lab.Affine(2.0), quota=Quota("others")) for _ in range(4)]
    thread = threading.Thread(target=engine.wait, args=(requests,))
    thread.start()
    lab.until(lambda: len(device.lanes[0]) == 2)
    device.seconds = 0.02
    # No time passes: no bundle ends before it is out.
    request = lab.submit(engine, program, model, 2.0, quota=HIGH)
    assert lab.answers([request]) == [6.0]
    assert request.flight.bundle.issue.passes
    assert device.loads()[request.flight.bundle.lane].kind is LaneKind.PASSING
    assert len(device.lanes[0]) == 2
    device.seconds = 0.05
    clock.runs_until(lambda: not thread.is_alive(), 0.05)
    assert [one.result()[0][0].item() for one in requests] == [2.0] * 4


def test_who_stops_is_neither_charged_for_it_nor_slow(lab: Any) -> None:
    clock = Told()
    engine, device = slow(lab, clock, max_bundle=1, segment=0.01, isolation="off")
    program, model = lab.program(), lab.Affine()
    device.seconds = 0.3
    for bundles in (1, 2):
        lab.submit(engine, program, model, quota=Quota("others")).result()
        clock.now += 0.4
        lab.until(lambda bundles=bundles: engine.stats().bundles == bundles)
    before = engine.stats().tenants["others"].device_seconds
    engine.wait([lab.submit(engine, program, model, quota=Quota("others"))])
    device.seconds = 0.2
    clock.now += 0.1
    engine.wait([lab.submit(engine, program, model, quota=HIGH)])
    clock.now += 1.0
    lab.until(lambda: engine.stats().bundles == 4)
    tenants = engine.stats().tenants
    assert tenants["others"].device_seconds - before == pytest.approx(0.3)
    assert tenants["high"].device_seconds == pytest.approx(0.2)
    forecast = engine._dispatchers[CPU].policy.predictor.forecast(program.fingerprint, 1, (16, 0))
    assert forecast.high == pytest.approx(0.3)


def test_segments_come_and_go_under_load(lab: Any) -> None:
    engine, device = slow(lab, max_bundle=2)
    device.seconds = 0.004
    program = lab.program()
    models = [lab.Affine(float(scale)) for scale in (2, 3)]
    wrong: list[object] = []
    done = threading.Event()

    def client(number: int, quota: Quota) -> None:
        while not done.is_set():
            got = lab.submit(engine, program, models[number], 2.0, quota=quota).result()[0][0].item()
            if got != 2.0 * (number + 2):
                wrong.append(got)

    threads = [threading.Thread(target=client, args=(n, q)) for n, q in enumerate((Quota("others"), HIGH))]
    for thread in threads:
        thread.start()
    for turn in range(15):
        time.sleep(0.03)
        segment = (None, 1e-3, 2e-3)[turn % 3]
        engine.configure(replace(engine.settings, segment=segment, isolation=("off", "caps")[turn % 2]))
    done.set()
    for thread in threads:
        thread.join(20)
    assert not wrong and not any(thread.is_alive() for thread in threads)
    assert all(got.ok > 10 and got.errors == 0 for got in engine.stats().tenants.values())

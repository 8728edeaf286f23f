"""Capturing and launching mixes on CUDA, with the driver played by fakes: what goes where, in which order."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_mux import compat
from torch_mux.lowering.kernels import common
from torch_mux.lowering.kernels.common import Launch
from torch_mux.lowering.kernels.linear import linear_launch
from torch_mux.lowering.pack import words
from torch_mux.runtime.bundle import Bundle
from torch_mux.runtime.executors import joint, joint_capture
from torch_mux.runtime.executors.capture import Steps
from torch_mux.runtime.executors.joint import JointLauncher
from torch_mux.runtime.executors.joint_capture import JointCapturer
from torch_mux.runtime.mixes import MixBook, MixState
from torch_mux.runtime.ring import TableRing
from torch_mux.runtime.scheduler.base import Issue
from torch_mux.runtime.verdicts import Verdict
from torch_mux.settings import Settings

HALF = torch.float16


class Stream:
    """Notes who waits for whom."""

    device = torch.device("cpu")

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self.log.append(f"host waits for {self.name}")


class Jobs:
    """A compile thread that works when it is told to."""

    def __init__(self) -> None:
        self.jobs: list[Any] = []
        self.breaths = 0

    def submit(self, job: Any, rank: Any = None) -> None:
        self.jobs.append(job)

    def breathe(self) -> None:
        self.breaths += 1

    def work(self) -> None:
        while self.jobs:
            self.jobs.pop(0)()


class Lane:
    """What a mix needs of a lane."""

    index, context, pool = 0, None, None
    marks = SimpleNamespace(take=lambda stream: SimpleNamespace(wait=lambda: None))

    def __init__(self, log: list[str]) -> None:
        self.stream, self.recorder = Stream("lane", log), Stream("trunk", log)
        self.ring = TableRing(8, 4096, torch.device("cpu"))

    def measure_pool(self) -> None:
        pass


class World:
    """The fakes of one test."""

    def __init__(self, lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lab = lab
        self.log: list[str] = []
        self.current = threading.local()
        self.graphs = 0
        self.lost = 0
        self.enqueued: list[Any] = []
        self.models: list[Any] = []
        names = iter(["rehearsal", "one", "two"])

        def side(device: Any, priority: int = 0, context: Any = None) -> Any:
            return SimpleNamespace(stream=Stream(next(names), self.log))

        monkeypatch.setattr(words, "BESIDE", 4.0)  # so that matches pay
        monkeypatch.setattr(joint_capture, "Side", side)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "stream", self._on)
        properties = SimpleNamespace(multi_processor_count=132)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(Launch, "start", lambda launch: self._start(launch))
        monkeypatch.setattr(common, "dependent", lambda device: True)
        monkeypatch.setattr(compat, "captured", self._captured)
        monkeypatch.setattr(compat, "Pool", self._pool)
        monkeypatch.setattr(joint, "_enqueue", lambda *args: self.enqueued.append(args))
        self.jobs, self.book = Jobs(), MixBook()
        self.built: list[Launch] = []
        builder: Any = SimpleNamespace(finish=self.built.extend)
        steps = Steps(lab.stack, self._move, self._move)
        jobs: Any = self.jobs
        self.capturer = JointCapturer(jobs, steps, threading.RLock(), builder, self.book)
        self.launcher = JointLauncher(self.capturer, self.book, 132)
        self.launcher.configure(Settings(keep_plans=False, pack_after=0.0))
        self.lane: Any = Lane(self.log)

    def launch(self, *args: Any) -> Any:
        found = self.launcher.launch(*args)
        return None if found is None else found[0]

    @contextlib.contextmanager
    def _on(self, stream: Stream) -> Iterator[None]:
        before = getattr(self.current, "stream", None)
        self.current.stream = stream
        yield
        self.current.stream = before

    def _start(self, launch: Launch) -> None:
        kind = "plain" if launch.plain else "dependent"
        stream = getattr(self.current, "stream", None)
        self.log.append(f"{stream.name if stream else 'nowhere'}: {kind} {launch.operation}")

    def _pool(self, device: Any) -> Any:
        inside: list[int] = []

        @contextlib.contextmanager
        def allocating() -> Iterator[None]:
            assert not inside, "torch gives a pool to one thread"
            inside.append(threading.get_ident())
            yield
            inside.clear()

        return SimpleNamespace(allocating=allocating)

    def _captured(self, run: Any, pool: Any, allocating: bool) -> Any:
        self.log.clear()
        run()
        self.graphs += 1
        if self.lost:
            self.lost -= 1
            raise RuntimeError("another thread ended the capture")
        return f"graph {self.graphs}"

    @staticmethod
    def _move(*args: Any) -> None:
        pass

    def bundles(self, engine: Any, *sizes: tuple[str, int]) -> list[Bundle]:
        found = []
        for name, count in sizes:
            program, model = self.lab.program(name), self.lab.Affine()
            self.models.append(model)
            requests = [self.lab.submit(engine, program, model, float(index)) for index in range(count)]
            requests[0].instance.bind()
            issue = Issue(program.fingerprint, requests, 1.0)
            found.append(Bundle(requests[0].served, requests, issue))
        return found


def launching(plan: Any, rows: Sequence[int]) -> None:
    """Has a plan launch linear layers of so many rows."""

    def run(rows_of: Tensor, control: Tensor, inputs: list[Tensor]) -> list[Tensor]:
        slots = rows_of.shape[0]
        table = torch.zeros(4, 1, dtype=torch.int64)
        for m in rows:
            x, out = torch.empty(slots, m, 64, dtype=HALF), torch.empty(slots, m, 32, dtype=HALF)
            linear_launch(x, table, 0, rows_of, control, out, n=32, k=64, sms=132).run()
        return [inputs[0], inputs[0]]

    plan.run = run


@pytest.fixture
def world(lab: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    return World(lab, monkeypatch)


def ready(world: World, names: Sequence[str]) -> Any:
    engine = world.lab.engine()
    for index, name in enumerate(names):
        program = engine.register(world.lab.program(name))
        assert engine.quiesce(10)
        launching(world.lab.plans[name], [40 + index, 50, 60])
        assert engine._served[program.fingerprint].plan is not None
    return engine


def test_a_mix_is_captured_when_it_comes_again_and_then_used(world: World) -> None:
    engine = ready(world, ["a", "b"])
    bundles = world.bundles(engine, ("b", 1), ("a", 3))
    assert world.launch(world.lane, bundles, 0.0) is None
    assert world.jobs.jobs == []
    assert world.launch(world.lane, bundles, 0.0) is None
    assert world.launch(world.lane, bundles, 0.0) is None
    assert len(world.jobs.jobs) == 1, "it is asked for once"
    world.jobs.work()
    flights = world.launch(world.lane, bundles, 0.0)
    assert flights is not None
    assert [flight.follows for flight in flights] == [False, True]
    assert [flight.bundle.served.key for flight in flights] == ["print-a", "print-b"]
    _, entry, executable, *_ = world.enqueued[0]
    table = entry.host
    one, two = executable.layouts
    assert (one.slots, two.slots, executable.starts) == (3, 1, (0, one.words))
    for flight, layout, start in zip(flights, executable.layouts, executable.starts):
        part = table[start : start + layout.words]
        requests = flight.bundle.requests
        assert layout.control(part).tolist() == [len(requests), 132]
        assert layout.input(part, 0).tolist() == [request.inputs[0].data_ptr() for request in requests]
        assert layout.output(part, 1).tolist() == [request.outputs[1].data_ptr() for request in requests]
    (report,) = world.launcher.reports()
    assert (report.state, report.seen, report.joint) == ("runs as one", 4, 1)


def test_matched_launches_join_the_streams_and_what_follows_is_plain(world: World) -> None:
    engine = ready(world, ["a", "b"])
    bundles = world.bundles(engine, ("a", 1), ("b", 1))
    for _ in range(2):
        world.launch(world.lane, bundles, 0.0)
    world.jobs.work()
    (mix,) = world.book._mixes.values()
    assert mix.schedule is not None
    assert mix.schedule.matched > 0
    log = world.log
    assert log[:2] == ["one waits for trunk", "two waits for trunk"]
    assert log[-2:] == ["trunk waits for one", "trunk waits for two"]
    joints = [index + 1 for index, line in enumerate(log) if line == "one waits for two"]
    assert len(joints) == mix.schedule.matched
    for index in joints:
        assert log[index].startswith("one: plain")
        assert log[index + 1] == "two waits for one"
    follow = [index for index in joints if any(line.startswith("two: ") for line in log[index:])]
    plain = [line for line in log if line.startswith("two: plain")]
    assert len(plain) == len(follow)
    assert len(world.built) == len(joints) + len(plain)
    assert {launch.plain for launch in world.built} == {True}
    world.capturer.configure(Settings(match=False, keep_plans=False))
    assert world.launcher.reports() == ()
    for _ in range(2):
        world.launch(world.lane, bundles, 0.0)
    world.jobs.work()
    assert "one waits for two" not in world.log
    assert all(line.split(": ")[1].startswith("dependent") for line in world.log if ": " in line)


def test_a_capture_that_is_lost_is_tried_again_and_one_that_fails_is_told(world: World) -> None:
    engine = ready(world, ["a", "b"])
    bundles = world.bundles(engine, ("a", 1), ("b", 1))
    world.lost = 2
    for _ in range(2):
        world.launch(world.lane, bundles, 0.0)
    world.jobs.work()
    assert world.graphs == 3
    assert world.launch(world.lane, bundles, 0.0) is not None
    other = world.bundles(engine, ("a", 2), ("b", 1))
    world.lost = 3
    for _ in range(4):
        assert world.launch(world.lane, other, 0.0) is None
        world.jobs.work()
    report = world.launcher.reports()[-1]
    assert report.state == "could not be built" and "another thread ended" in report.reason


def test_tables_that_moved_need_another_graph(world: World) -> None:
    engine = ready(world, ["a", "b"])
    bundles = world.bundles(engine, ("a", 1), ("b", 1))
    for _ in range(2):
        world.launch(world.lane, bundles, 0.0)
    world.jobs.work()
    world.lab.plans["b"].storage.generation += 1
    assert world.launch(world.lane, bundles, 0.0) is None
    world.jobs.work()
    assert world.launch(world.lane, bundles, 0.0) is not None
    assert world.graphs == 2


def test_tables_that_move_during_a_capture_make_it_void(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ready(world, ["a", "b"])
    bundles = world.bundles(engine, ("a", 1), ("b", 1))
    captured = compat.captured

    def meanwhile(*args: Any, **named: Any) -> Any:
        graph = captured(*args, **named)
        if world.graphs == 1:
            world.lab.plans["a"].storage.generation += 1
        return graph

    monkeypatch.setattr(compat, "captured", meanwhile)
    for _ in range(2):
        world.launcher.launch(world.lane, bundles, 0.0)
    world.jobs.work()
    assert world.launcher.launch(world.lane, bundles, 0.0) is None
    world.jobs.work()
    assert world.launcher.launch(world.lane, bundles, 0.0) is not None
    assert world.graphs == 2


def test_a_program_that_is_dropped_while_its_mix_is_built(world: World) -> None:
    engine = ready(world, ["a", "b"])
    bundles = world.bundles(engine, ("a", 1), ("b", 1))
    for _ in range(2):
        world.launch(world.lane, bundles, 0.0)
    world.launcher.forget(bundles[0].served)
    world.jobs.work()
    assert world.graphs == 0
    assert world.launcher.reports() == ()


def test_rows_that_are_not_written_yet_go_by_themselves(world: World) -> None:
    engine = ready(world, ["a", "b"])
    bundles = world.bundles(engine, ("a", 1), ("b", 1))
    for _ in range(2):
        world.launch(world.lane, bundles, 0.0)
    world.jobs.work()
    bundles[0].requests[0].instance.renew = True
    assert world.launch(world.lane, bundles, 0.0) is None
    assert world.enqueued == []


def test_a_mix_too_large_for_a_table_is_not_built(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ready(world, ["a", "b"])
    bundles = world.bundles(engine, ("a", 3), ("b", 1))
    monkeypatch.setattr(joint.Lane, "words", staticmethod(lambda: 8))
    for _ in range(3):
        assert world.launch(world.lane, bundles, 0.0) is None
    assert world.jobs.jobs == []
    assert world.launcher.reports()[0].state == MixState.FAILED.value


def test_a_mix_that_goes_on_is_built_and_the_slower_way_is_left(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Any] = []
    monkeypatch.setattr(joint_capture.verdicts, "write", lambda name, verdict: written.append(name))
    monkeypatch.setattr(joint_capture.verdicts, "read", lambda name: None)
    engine = ready(world, ["a", "b"])
    bundles = world.bundles(engine, ("a", 1), ("b", 1))
    world.launcher.configure(Settings(pack_after=1.0, keep_plans=True))

    def once(now: float) -> bool:
        """Whether it went out as one; that way it takes twice as long."""
        flights = world.launch(world.lane, bundles, now)
        for bundle in bundles:
            assert bundle.run is not None
            bundle.run.landed(1e-3 if flights is None else 2e-3, failed=False)
        return flights is not None

    assert not any(once(number * 1e-3) for number in range(500))
    assert world.jobs.jobs == [], "a burst of half a second"
    assert not any(once(10.0 + number * 0.02) for number in range(60))
    world.jobs.work()
    ways = [once(12.0 + number * 0.02) for number in range(60)]
    assert ways[:4] == [True, False, True, False], "both are measured"
    assert not any(ways[20:]), "own plans are faster"
    (report,) = world.launcher.reports()
    assert report.state == MixState.SLOWER.value
    assert (report.own_seconds, report.joint_seconds) == (pytest.approx(2e-3), pytest.approx(4e-3))
    world.jobs.work()
    assert len(written) == 1


def test_a_mix_that_an_earlier_process_found_slower_is_not_built(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Verdict.known(own=1e-3, joint=2e-3)
    monkeypatch.setattr(joint_capture.verdicts, "read", lambda name: found)
    engine = ready(world, ["a", "b"])
    bundles = world.bundles(engine, ("a", 1), ("b", 1))
    world.launcher.configure(Settings(pack_after=0.1, keep_plans=True))
    for number in range(100):
        assert world.launch(world.lane, bundles, 0.01 * number) is None
        world.jobs.work()
    assert world.graphs == 0
    assert "own plans are used" in world.launcher.reports()[0].measured

"""Bundles of different programs beside each other: what waits for what, who is told, charged and failed."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from clocks import Told
from slow_device import slow

from torch_mux import compat
from torch_mux.errors import ExecutionFailed
from torch_mux.runtime import lanes
from torch_mux.runtime.beside import apart, limited
from torch_mux.runtime.bundle import Bundle
from torch_mux.runtime.executors import cuda, lane_set
from torch_mux.runtime.executors.cuda import CudaExecutor
from torch_mux.runtime.executors.joint import _flights
from torch_mux.runtime.interrupt import Interrupt
from torch_mux.runtime.lanes import CudaFlight
from torch_mux.runtime.scheduler.base import Issue, LaneKind
from torch_mux.runtime.timeline import Timeline, recorders
from torch_mux.settings import Settings
from torch_mux.types import Quota


class Event:
    """Of a device that does what it is told, when it is told."""

    def __init__(self) -> None:
        self.done, self.at = False, 0.0
        self.cuda_event = id(self)

    def record(self, stream: Stream) -> None:
        self.done = False

    def query(self) -> bool:
        return self.done

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)

    def synchronize(self) -> None:
        assert self.done, "the host would wait for ever"


class Stream:
    device = torch.device("cpu")

    def __init__(self, number: int) -> None:
        self.cuda_stream, self.waits = number, []

    def wait_event(self, event: Event) -> None:
        self.waits.append(event)

    def synchronize(self) -> None:
        pass


class World:
    """A :class:`CudaExecutor` whose driver is played."""

    def __init__(self, lab: Any, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        numbers = iter(range(1, 100))
        self.lab, self.joint, self.now = lab, False, 0.0

        def side(device: Any, priority: int = 0, context: Any = None) -> Any:
            number = next(numbers)
            return SimpleNamespace(stream=Stream(number), address=number)

        properties = SimpleNamespace(multi_processor_count=132)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(compat, "guard_synchronize", lambda: None)
        monkeypatch.setattr(compat, "on_stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(compat.native, "enqueue", lambda: None)
        monkeypatch.setattr(lanes, "Side", side)
        monkeypatch.setattr(lanes, "new_event", lambda timing=False: Event())
        steps: Any = SimpleNamespace(run=lambda *args: None)
        capturer: Any = SimpleNamespace(
            graphs=lambda *args: (),
            generation=lambda served: 0,
            configure=lambda settings: None,
            jobs=lambda: 0,
            worked_since=lambda jobs: False,
        )
        launcher: Any = SimpleNamespace(configure=lambda settings: None, launch=self._launch)
        device = torch.device("cpu")
        self.executor = CudaExecutor(device, steps, capturer, lambda sms: launcher, lambda: self.now)
        self.executor.configure(Settings(**settings))
        self.engine = lab.engine()
        self.models = {name: lab.Affine() for name in "abcdef"}
        for name in self.models:
            self.engine.register(lab.program(name))
        assert self.engine.quiesce(10)

    def _launch(
        self, lane: Any, bundles: Sequence[Bundle], now: float, after: Sequence[CudaFlight]
    ) -> tuple[list[CudaFlight], bool] | None:
        for request in (request for bundle in bundles for request in bundle.requests if self.joint):
            if request.instance.row is None:
                request.instance.bind()
        return (_flights(lane, bundles, now, after), True) if self.joint else None

    def bundle(
        self, name: str, quota: Quota | None = None, share: float = 1.0, reserve: float = 0.0
    ) -> Bundle:
        program, model = self.lab.program(name), self.models[name]
        request = self.lab.submit(self.engine, program, model, quota=quota or Quota())
        request.mark = SimpleNamespace(event=Event(), address=0)
        loads = self.executor.loads()
        lane = [index for index, load in enumerate(loads) if load.branch == "abcdef".index(name) % 4][0]
        branch = loads[lane].branch
        issue = Issue(program.fingerprint, [request], share, lane, reserve=reserve, branch=branch)
        return Bundle(request.served, [request], issue)

    def launch(self, *bundles: Bundle) -> list[CudaFlight]:
        return [self.executor.launch(bundle) for bundle in bundles]  # type: ignore[misc]

    def load(self) -> list[int]:
        return [load.bundles for load in self.executor.loads() if load.branch is not None]

    def begins(self, *flights: CudaFlight, at: float = 0.0) -> None:
        for flight in flights:
            start: Any = flight.start.event
            start.at, start.done = at, True

    def ends(self, flight: CudaFlight, at: float, seconds: float) -> None:
        start: Any = flight.start.event
        end: Any = flight.end.event
        start.at, start.done, end.at, end.done = at - seconds, True, at, True


@pytest.fixture
def world(lab: Any, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(lab, monkeypatch)


def streams(flights: Sequence[CudaFlight], world: World) -> list[Any]:
    found = []
    for flight in flights:
        (lane,) = [lane for lane in world.executor._lanes if flight in lane.flights]
        found.append(lane.stream)
    return found


def waits(stream: Any, flight: CudaFlight) -> bool:
    return flight.end.event in stream.waits


def test_programs_on_different_branches_have_streams_of_their_own_and_wait_for_nobody(world: World) -> None:
    flights = world.launch(*(world.bundle(name) for name in "abcd"))
    assert len({id(stream) for stream in streams(flights, world)}) == 4
    assert not any(waits(stream, flight) for stream in streams(flights, world) for flight in flights)
    (again,) = world.launch(world.bundle("e"))
    assert streams([again], world) == streams(flights[:1], world), "five programs on four branches"
    assert world.load() == [2, 1, 1, 1]


def test_who_overtakes_waits_for_his_caller_only(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stops for him must not be what he waits for."""
    monkeypatch.setattr(lane_set, "highest_priority", lambda: -5)
    world = World(lab, monkeypatch, segment=1e-3, isolation="off")
    alice = Quota("alice", sms=0.5)
    before = world.launch(*(world.bundle(name, alice, 0.5) for name in "ab"))
    bundle = world.bundle("a", alice, 0.5)
    loads = world.executor.loads()
    (lane,) = [index for index, load in enumerate(loads) if load.kind is LaneKind.PASSING]
    bundle.issue = replace(bundle.issue, lane=lane, branch=None, passes=True)
    (flight,) = world.launch(bundle)
    (stream,) = streams([flight], world)
    assert stream not in streams(before, world)
    assert stream.waits == [bundle.requests[0].mark.event]
    assert world.load() == [1, 1, 0, 0]


def test_bundles_of_a_tenant_with_a_limit_do_not_overlap(world: World) -> None:
    alice, bob = Quota("alice", sms=0.5), Quota("bob", sms=0.5)
    one, other, third, free = world.launch(
        world.bundle("a", alice, 0.5), world.bundle("b", bob, 0.5), world.bundle("c", alice, 0.5),
        world.bundle("d", Quota("carol")),
    )  # fmt: skip
    _, second, last, whole = streams([one, other, third, free], world)
    assert not waits(second, one), "other tenants' limits are their own"
    assert waits(last, one) and not waits(last, other)
    assert not whole.waits[1:], "who has no limit waits for nobody but his caller"
    assert world.executor.at_work() == []
    world.begins(one, other, free)
    assert world.executor.at_work() == [one, other, free]
    world.now = 2.0
    world.ends(third, 2.0, 0.5)
    assert world.executor.reap() == []
    world.ends(one, 1.5, 1.5)
    landed = world.executor.reap()
    assert landed == [one, third]
    assert (one.ended, third.ended) == (1.5, 2.0)


def test_bundles_that_leave_room_for_a_reserve_follow_each_other(world: World) -> None:
    one, other = world.launch(world.bundle("a", share=0.75), world.bundle("b", share=0.75))
    assert waits(streams([other], world)[0], one)


def test_what_is_limited_and_what_keeps_apart() -> None:
    def issue(*quotas: Quota, share: float = 1.0) -> Issue:
        return Issue("p", [SimpleNamespace(quota=quota) for quota in quotas], share)  # type: ignore[misc]

    alice, bob, carol = Quota("alice", sms=0.5), Quota("bob", sms=0.5), Quota("carol")
    assert not limited(issue(carol))
    assert limited(issue(alice, bob)), "together they may use all of it, and each half"
    assert apart(issue(alice, bob), issue(bob, carol))
    assert not apart(issue(alice, carol), issue(bob, carol))


def test_a_mix_goes_behind_what_its_programs_have_under_way_and_they_behind_it(world: World) -> None:
    before = world.launch(*(world.bundle(name) for name in "ab"))
    world.joint = True
    flights: Any = world.executor.launch_together([world.bundle("b"), world.bundle("c")])
    first = world.executor._lanes.first()
    assert all(flight in first.flights for flight in flights)
    assert flights[0].after == (before[1],), "what is on the same stream comes first anyway"
    assert world.load() == [2, 2, 1, 0], "the first branch carries it, those of its programs have it as guest"
    world.begins(*before)
    assert world.executor.at_work() == [before[0], before[1]]
    (again,) = world.launch(world.bundle("c"))
    assert waits(streams([again], world)[0], flights[0])
    world.now = 3.0
    for flight, at, seconds in ((before[0], 1.0, 1.0), (before[1], 1.5, 1.5), (flights[0], 2.5, 1.0)):
        world.ends(flight, at, seconds)
    landed = world.executor.reap()
    assert [flight.ended for flight in landed] == [1.0, 1.5, 2.5, 2.5]
    assert world.load() == [0, 0, 1, 0]
    world.begins(again, at=2.5)
    assert world.executor.at_work() == [again] and again.began == 2.5
    assert again.after == tuple(flights[1:]), "it is let go of when that has ended"


def test_a_new_row_waits_for_bundles_of_its_own_program_only(world: World) -> None:
    world.launch(world.bundle("a"), world.bundle("b"))
    world.models["c"] = world.lab.Affine()
    world.launch(world.bundle("c"))  # the events of the others are not there yet: waiting would fail
    world.models["a"] = world.lab.Affine()
    with pytest.raises(AssertionError, match="for ever"):
        world.launch(world.bundle("a"))


def test_a_bundle_keeps_to_what_the_others_leave_it(world: World) -> None:
    bundle = world.bundle("a")
    bundle.issue = Issue(bundle.issue.key, bundle.issue.requests, 1.0, bundle.issue.lane, beside=0.25)
    world.launch(bundle)
    lane = world.executor._lanes.first()
    assert lane.ring.table[:1].view(torch.int32).tolist() == [1, 33]


def served(
    lab: Any, names: str, clock: Callable[[], float] = time.perf_counter, **settings: Any
) -> tuple[Any, Any, dict[str, Any]]:
    engine, device = slow(lab, clock, branches=4, **settings)
    models = {name: lab.Affine(float(index + 2)) for index, name in enumerate(names)}
    for name in names:
        engine.register(lab.program(name))
    assert engine.quiesce(10)
    return engine, device, models


def test_overlapping_bundles_are_charged_the_busy_time_and_no_more(lab: Any) -> None:
    clock = Told()
    engine, device, models = served(lab, "abcd", clock)
    device.seconds_of = lambda bundle: {"a": 0.05, "b": 0.1, "c": 0.15, "d": 0.2}[bundle.served.program.name]
    with recorders.record(Timeline()) as timeline:
        requests = [
            lab.submit(engine, lab.program(name), model, 1.0, quota=Quota(name))
            for name, model in models.items()
        ]
        engine.wait(requests)
        clock.now += 0.21  # one after another they take half a second
        lab.until(lambda: all(request.done() for request in requests))
    assert [request.result()[0][0].item() for request in requests] == [2.0, 3.0, 4.0, 5.0]
    lab.until(lambda: engine.stats().bundles == 4)
    assert {round(span.ended - span.seconds, 9) for span in timeline.spans} == {100.0}
    tenants = engine.stats().tenants
    assert sum(tenants[name].device_seconds for name in "abcd") == pytest.approx(0.2)
    steps = [0.05 / slots for slots in (4, 3, 2, 1)]
    for index, name in enumerate("abcd"):
        assert tenants[name].device_seconds == pytest.approx(sum(steps[: index + 1]))


def test_a_program_that_is_idle_goes_out_while_the_end_of_another_is_waited_for(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, device, models = served(lab, "ab", Told())
    waits, await_end = threading.Event(), device.await_end

    def waiting(interrupt: Interrupt | None = None) -> None:
        waits.set()
        await_end(interrupt)

    monkeypatch.setattr(device, "await_end", waiting)
    requests = []
    for name in "ab":
        requests.append(lab.submit(engine, lab.program(name), models[name], 1.0, quota=Quota(name)))
        requests[-1].add_done_callback(lambda _: None)  # somebody wants to be told of its end
        engine.kick()
        lab.until(lambda: requests[-1].out)  # no time passes: nothing ends before
        assert waits.wait(10)
    assert len({request.flight.bundle.lane for request in requests}) == 2
    names = [(request.served.key, False) for request in requests]
    assert all(map(device.at_it, names)) and not device.at_it((names[0][0], True))


def test_a_branch_that_fails_fails_its_own_tenants(lab: Any) -> None:
    engine, _, models = served(lab, "abcd")

    def broken(inputs: Any) -> None:
        raise ValueError("mine")

    lab.plans["b"].before = broken
    requests = [lab.submit(engine, lab.program(name), model, 1.0) for name, model in models.items()]
    engine.wait(requests)
    for request, name in zip(requests, "abcd"):
        if name == "b":
            with pytest.raises(ExecutionFailed, match="mine"):
                request.result()
        else:
            assert request.result()[0][0].item() == float("abcd".index(name) + 2)


def test_a_program_that_is_removed_while_others_are_at_work(lab: Any) -> None:
    clock = Told()
    engine, _, models = served(lab, "ab", clock)
    requests = [lab.submit(engine, lab.program(name), model, 1.0) for name, model in models.items()]
    engine.wait(requests)
    engine.remove(models["a"].tensors())
    assert lab.plans["a"].storage.bound == 1, "the device still reads its row"
    clock.now += 1.0
    lab.until(lambda: lab.plans["a"].storage.bound == 0)
    assert requests[0].result()[0][0].item() == 2.0
    assert lab.plans["b"].storage.bound == 1


def test_thirty_programs_at_once_on_four_branches(lab: Any) -> None:
    engine, device, _ = served(lab, "")
    device.seconds = 0.002
    programs = [lab.program(f"p{number}") for number in range(30)]
    for program in programs:
        engine.register(program)
    assert engine.quiesce(10)
    models = [lab.Affine(float(number)) for number in range(30)]
    requests = [
        lab.submit(engine, program, model, 1.0)
        for _ in range(3)
        for program, model in zip(programs, models, strict=True)
    ]
    engine.wait(requests)
    assert [request.result()[0][0].item() for request in requests] == [float(n % 30) for n in range(90)]
    lab.until(lambda: all(request.done() for request in requests))


def test_branches_are_made_when_they_are_needed(world: World) -> None:
    world.launch(world.bundle("a"))
    assert len(world.executor._lanes) == 1
    assert len(world.load()) == cuda.BRANCHES


@pytest.mark.parametrize("beside", [False, True])
def test_a_plan_is_slow_only_where_it_has_the_device_to_itself(lab: Any, beside: bool) -> None:
    clock = Told()
    engine, device, models = served(lab, "ab", clock, straggler=4.0)
    took = {"a": 0.002, "b": 0.6}
    device.seconds_of = lambda bundle: took[bundle.served.program.name]

    def run(name: str) -> None:
        request = lab.submit(engine, lab.program(name), models[name], 1.0)
        engine.wait([request])
        clock.now += took[name] + 1e-6
        lab.until(request.done)

    for _ in range(10):
        run("a")
    took["a"] = 0.02
    if beside:
        engine.wait([lab.submit(engine, lab.program("b"), models["b"], 1.0)])
    for _ in range(10):
        run("a")
    lab.until(lambda: engine.quiesce(10))
    found = engine._served["print-a"]
    assert (found.detour is not None) is not beside

"""Which bundles go out as one, and what becomes of them when that goes well or wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from clocks import Told

from torch_mux.errors import ExecutionFailed
from torch_mux.runtime.bundle import Bundle
from torch_mux.runtime.executors.base import Flight
from torch_mux.runtime.executors.cpu import CpuExecutor
from torch_mux.runtime.timeline import Timeline, recorders
from torch_mux.settings import Settings
from torch_mux.types import Quota


class Together(CpuExecutor):
    """Runs bundles of several programs one after another and says that they were one."""

    def __init__(self, device: torch.device, stack: Any) -> None:
        super().__init__(device, stack)
        self.joint: list[list[tuple[str, int]]] = []
        self.single: list[tuple[str, int]] = []
        self.answer: BaseException | str | None = "run"
        self.unpackable: set[str] = set()

    def configure(self, settings: Settings) -> None:
        super().configure(settings)
        self.together = 8 if settings.pack is None else settings.pack

    def packs(self, served: Any) -> bool:
        return served.program.name not in self.unpackable

    def launch(self, bundle: Bundle) -> Flight | None:
        self.single.append((bundle.served.program.name, len(bundle.requests)))
        return super().launch(bundle)

    def launch_together(self, bundles: Sequence[Bundle]) -> Sequence[Flight] | None:
        self.joint.append([(bundle.served.program.name, len(bundle.requests)) for bundle in bundles])
        if isinstance(self.answer, BaseException):
            raise self.answer
        if self.answer is None:
            return None
        for bundle in bundles:
            super().launch(bundle)
        return ()


class Place:
    def __init__(self, lab: Any, names: Sequence[str], **settings: Any) -> None:
        made: list[Together] = []

        def make(engine: Any, device: torch.device) -> Together:
            executor = Together(device, lab.stack)
            executor.configure(engine.settings)
            made.append(executor)
            return executor

        self.lab, self.engine = lab, lab.engine(executor=make, **settings)
        self.models = {name: lab.Affine(float(index + 2)) for index, name in enumerate(names)}
        for name in names:
            self.engine.register(lab.program(name))
        assert self.engine.quiesce(10)
        self.executor = made[0]

    def submit(self, *calls: tuple[str, Quota | None]) -> list[Any]:
        """All of these at once."""
        found = []
        for number, (name, quota) in enumerate(calls):
            instance = self.engine.instance(self.lab.program(name), self.models[name].tensors())
            found.append((instance, [self.lab.x(float(number + 1))], quota or Quota()))
        return list(self.engine.submit_all(found))

    def check(self, requests: Sequence[Any], names: Sequence[str]) -> None:
        for number, (request, name) in enumerate(zip(requests, names, strict=True)):
            scale = float(self.models[name].weight[0].detach())
            assert torch.equal(request.result()[0], self.lab.x(scale * (number + 1)))


NAMES = ["a", "b", "a", "c"]


def test_what_is_pending_of_several_programs_goes_out_as_one(lab: Any) -> None:
    place = Place(lab, "abc")
    place.check(place.submit(*((name, None) for name in NAMES)), NAMES)
    assert place.executor.joint == [[("a", 2), ("b", 1), ("c", 1)]]
    assert place.executor.single == []


@pytest.mark.parametrize("answer", [None, RuntimeError("no graph")])
def test_each_goes_by_itself_where_the_mix_is_not_ready_or_fails(lab: Any, answer: Any) -> None:
    place = Place(lab, "abc")
    place.executor.answer = answer
    place.check(place.submit(*((name, None) for name in NAMES)), NAMES)
    assert place.executor.single == [("a", 2), ("b", 1), ("c", 1)]


def test_only_the_guilty_request_fails(lab: Any) -> None:
    place = Place(lab, "abc")

    def before(inputs: Any) -> None:
        if bool((inputs[0] == 3.0).any()):
            raise ValueError("mine")

    lab.plans["a"].before = before
    requests = place.submit(*((name, None) for name in NAMES))
    with pytest.raises(ExecutionFailed, match="mine"):
        requests[2].result()
    place.check([requests[0], requests[1]], ["a", "b"])
    assert float(requests[3].result()[0][0]) == 4.0 * 4


def test_an_interrupt_loses_nothing(lab: Any) -> None:
    place = Place(lab, "ab")
    place.executor.answer = KeyboardInterrupt()
    requests = place.submit(("a", None), ("b", None))
    with pytest.raises(KeyboardInterrupt):
        place.engine.wait(requests)
    place.executor.answer = "run"
    place.check(requests, ["a", "b"])


def test_what_may_not_be_packed_goes_by_itself(lab: Any) -> None:
    place = Place(lab, "abc")
    place.executor.unpackable = {"b"}
    place.check(place.submit(*((name, None) for name in NAMES)), NAMES)
    assert place.executor.joint == []
    capped = Quota("capped", sms=0.5)
    place.executor.unpackable = set()
    place.check(place.submit(("a", capped), ("b", capped)), ["a", "b"])
    place.check(place.submit(("a", None), ("b", capped)), ["a", "b"])
    assert place.executor.joint == []
    fresh = Place(lab, "abc")
    fresh.check(fresh.submit(("a", capped), ("a", None), ("b", None)), ["a", "a", "b"])
    assert fresh.executor.joint == [[("a", 2), ("b", 1)]], "a bundle whose tenants may take all of the device"


def test_no_more_programs_than_the_setting_says(lab: Any) -> None:
    names = [f"p{number}" for number in range(30)]
    place = Place(lab, names, pack=4)
    place.check(place.submit(*((name, None) for name in names)), names)
    assert [len(mix) for mix in place.executor.joint] == [4] * 7 + [2]
    place.engine.configure(Settings(pack=1))
    place.check(place.submit(*((name, None) for name in names)), names)
    assert len(place.executor.joint) == 8


def test_who_is_due_is_packed_only_if_all_end_in_time(lab: Any) -> None:
    place = Place(lab, "ab")
    hurried, lenient = Quota("hurried", slo=1e-7), Quota("lenient", slo=30.0)
    place.check(place.submit(("a", lenient), ("b", lenient)), ["a", "b"])
    assert place.executor.joint == [], "nothing is known of these programs yet"
    for _ in range(12):
        place.check(place.submit(("a", None)), ["a"])
        place.check(place.submit(("b", None)), ["b"])
    place.check(place.submit(("a", lenient), ("b", lenient)), ["a", "b"])
    assert place.executor.joint == [[("a", 1), ("b", 1)]]
    place.check(place.submit(("a", hurried), ("b", None)), ["a", "b"])
    place.check(place.submit(("a", None), ("b", hurried)), ["a", "b"])
    assert len(place.executor.joint) == 1


def test_device_time_is_divided_by_work_over_all_programs(lab: Any) -> None:
    place = Place(lab, "ab")
    for name, work in (("a", 1), ("b", 7)):
        place.engine._served[f"print-{name}"].work = work
    timeline = Timeline()
    with recorders.record(timeline):
        place.check(place.submit(("a", Quota("one")), ("a", Quota("two")), ("b", Quota("three"))), "aab")
    stats = place.engine.stats()
    one, two, three = (stats.tenants[name].device_seconds for name in ("one", "two", "three"))
    assert one == pytest.approx(two, rel=1e-6)
    assert three == pytest.approx(7 * one, rel=1e-6)
    assert one + two + three == pytest.approx(stats.device_seconds, rel=1e-9)
    assert (stats.bundles, stats.requests) == (2, 3)
    first, second = timeline.spans
    assert (first.mix, first.leads, second.leads) == ("a x2 + b x1", True, False)
    assert first.whole == second.whole == pytest.approx(first.seconds + second.seconds)


def test_a_reserve_that_is_no_longer_in_use_packs_nothing_apart(lab: Any) -> None:
    """Its tenant asked once: while it is at work, or will be soon, bundles go out by themselves."""
    clock = Told()
    place = Place(lab, ["a", "b"], clock=clock, isolation="caps")

    def take(inputs: Any) -> None:
        clock.now += 3e-3

    lab.plans["a"].before = take
    place.submit(("a", Quota("reserved", reserve=0.25)))[0].result()
    clock.now += 0.3  # a hundred bundles
    requests = place.submit(("a", Quota("x")), ("b", Quota("y")))
    place.check(requests, ["a", "b"])
    assert place.executor.joint == [[("a", 1), ("b", 1)]]


def test_the_higher_class_goes_first_where_the_mix_is_not_built(lab: Any) -> None:
    place = Place(lab, "ab")
    place.executor.answer = None
    place.check(place.submit(("a", Quota("low")), ("b", Quota("high", priority=1))), ["a", "b"])
    assert place.executor.single == [("b", 1), ("a", 1)]


def test_no_lower_class_rides_along_while_a_higher_one_waits_for_another_program(lab: Any) -> None:
    place = Place(lab, "ab")
    high, low = Quota("high", priority=1), Quota("low")
    place.check(place.submit(("a", high), ("a", low), ("a", low), ("b", Quota("other", priority=1))), "aaab")
    assert place.executor.joint == [[("a", 1), ("b", 1)]]


def test_who_is_interrupted_between_two_programs_leaves_nothing_behind(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(lab, "abc", max_bundle=8)
    (dispatcher,) = place.engine._dispatchers.values()
    pop, popped = dispatcher._runner.pop, []

    def popping(issue: Any, now: float) -> Any:
        popped.append(issue)
        if len(popped) == 2:
            raise KeyboardInterrupt
        return pop(issue, now)

    monkeypatch.setattr(dispatcher._runner, "pop", popping)
    requests = place.submit(("a", None), ("b", None), ("c", None))
    with pytest.raises(KeyboardInterrupt):
        place.engine.wait(requests)
    dispatcher._driver._skip = 3  # an order had to be kept lately
    place.check(requests, "abc")

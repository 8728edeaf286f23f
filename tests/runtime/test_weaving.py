"""Functions that take turns: strict hand-over, errors that reach the right one, nothing left behind."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_mux.lowering.kernels.interception import Turn, Work, handed, left_while_handed
from torch_mux.lowering.kernels.operation import Operation
from torch_mux.lowering.pack.schedule import Schedule
from torch_mux.lowering.pack.search import pack
from torch_mux.runtime.steppers import ENDED, Abandoned, Hand, Stepper
from torch_mux.runtime.weave import ScheduleDiffers, in_turn, observed, weave


@pytest.fixture
def steppers() -> Any:
    made = [Stepper(f"member {index}") for index in range(4)]
    before = threading.active_count()
    yield made
    for stepper in made:
        stepper.close()
    assert threading.active_count() <= before


def test_one_runs_at_a_time_and_gets_its_replies(steppers: list[Stepper]) -> None:
    seen: list[Any] = []

    def body(hand: Hand) -> None:
        seen.append(threading.current_thread().name)
        seen.append(hand("first"))
        seen.append(hand("second"))

    steppers[0].begin(body)
    assert seen == []
    assert steppers[0].step() == "first"
    assert seen == ["member 0"]
    assert steppers[0].step(1) == "second"
    assert steppers[0].step(2) is ENDED
    assert seen == ["member 0", 1, 2]
    steppers[0].begin(lambda hand: hand("again"))
    assert steppers[0].step() == "again"


def test_errors_reach_who_steps_and_the_thread_goes_on(steppers: list[Stepper]) -> None:
    def body(hand: Hand) -> None:
        hand(1)
        raise ValueError("mine")

    steppers[0].begin(body)
    assert steppers[0].step() == 1
    with pytest.raises(ValueError, match="mine"):
        steppers[0].step()
    steppers[0].begin(lambda hand: None)
    assert steppers[0].step() is ENDED


def test_who_is_abandoned_cleans_up_even_if_he_goes_on(steppers: list[Stepper]) -> None:
    seen: list[str] = []

    def body(hand: Hand) -> None:
        try:
            hand(1)
        except Abandoned:
            seen.append("first")
        try:
            hand(2)
        finally:
            seen.append("second")

    steppers[0].begin(body)
    steppers[0].step()
    with pytest.raises(RuntimeError, match="has not ended"):
        steppers[0].begin(body)
    steppers[0].abandon()
    assert seen == ["first", "second"]
    steppers[1].begin(body)
    steppers[1].abandon()  # before it began
    assert len(seen) == 2


def test_an_interrupted_wait_is_taken_up_by_the_abandoning(steppers: list[Stepper]) -> None:
    """As if Ctrl-C had come while the function ran: its value is still to come."""
    stepper, going = steppers[0], threading.Event()

    def body(hand: Hand) -> None:
        assert going.wait(10)
        hand("late")

    stepper.begin(body)
    stepper._stepping = True
    stepper._steps.put(None)
    going.set()
    stepper.abandon()
    stepper.begin(lambda hand: None)
    assert stepper.step() is ENDED


def test_context_variables_of_the_caller_are_seen(steppers: list[Stepper]) -> None:
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable")
    variable.set(7)
    steppers[0].begin(lambda hand: hand(variable.get()))
    assert steppers[0].step() == 7


class Count:
    def seconds(self, operations: Any, sms: int) -> float:
        return 1.0 + len(operations) / sms


def operation(form: str, tiles: int) -> Operation:
    return Operation("linear", ((tiles, 1, 1),), torch.float16, form=form)


def body_of(member: int, operations: list[Operation], log: list[tuple[int, int]]) -> Callable[[], None]:
    def body() -> None:
        for index, each in enumerate(operations):
            assert handed(Turn(each)) is not None
            log.append((member, index))

    return body


launches = st.builds(operation, st.sampled_from("ab"), st.integers(1, 9))
members_of = st.lists(st.lists(launches, max_size=6), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(members_of)
def test_every_schedule_is_woven_as_it_says(members: list[list[Operation]]) -> None:
    log: list[tuple[int, int]] = []
    steppers = [Stepper("one") for _ in members]
    schedule = pack(members, Count(), 8)
    asked: list[tuple[tuple[int, ...], int, bool]] = []

    def issue(places: Any, works: Any, sms: int, beside: bool) -> Any:
        asked.append((tuple(places), sms, beside))
        return works

    weave(steppers, [body_of(m, each, log) for m, each in enumerate(members)], schedule, issue)
    for stepper in steppers:
        stepper.close()
    assert sorted(log) == [(m, index) for m, each in enumerate(members) for index in range(len(each))]
    for member in range(len(members)):
        own = [index for which, index in log if which == member]
        assert own == sorted(own)
    steps = [step for word in schedule.words for strand in word.strands for step in strand.steps]
    assert sorted(places for places, _, _ in asked) == sorted(tuple(m for m, _ in step) for step in steps)


def schedule_of(*members: list[Operation]) -> Schedule:
    return pack(members, Count(), 8)


@pytest.mark.parametrize("fault", ["raises", "launches less", "launches more", "launches another"])
def test_one_member_that_goes_wrong_ends_all(steppers: list[Stepper], fault: str) -> None:
    good, log = [operation("a", 1), operation("b", 2)], []  # type: ignore[var-annotated]
    other = {"launches less": good[:1], "launches more": [*good, good[0]], "launches another": good[::-1]}
    ended: list[str] = []

    def careful() -> None:
        try:
            body_of(0, good, log)()
        finally:
            ended.append("careful")

    def guilty() -> None:
        body_of(1, other.get(fault, good[:1]), log)()
        if fault == "raises":
            raise ValueError("mine")

    error = ValueError if fault == "raises" else ScheduleDiffers
    for _ in range(2):  # and the steppers serve again
        with pytest.raises(error):
            weave(steppers, [careful, guilty], schedule_of(good, good), in_turn)
    assert ended == ["careful", "careful"]
    weave(steppers, [body_of(0, good, log)], schedule_of(good), in_turn)


def test_an_issuer_that_raises_ends_all(steppers: list[Stepper]) -> None:
    def issue(members: Any, works: Any, sms: int, beside: bool) -> list[Work]:
        raise RuntimeError("no launch")

    with pytest.raises(RuntimeError, match="no launch"):
        weave(steppers, [body_of(0, [operation("a", 1)], [])], schedule_of([operation("a", 1)]), issue)


def test_a_context_of_one_thread_at_a_time_is_left_while_another_runs(steppers: list[Stepper]) -> None:
    """As torch's allocator wants it, which gives a pool to one thread."""
    inside: list[int] = []

    @contextlib.contextmanager
    def only(member: int) -> Iterator[None]:
        assert inside == []
        inside.append(member)
        try:
            yield
        finally:
            inside.remove(member)

    def body(member: int, operations: list[Operation]) -> None:
        with left_while_handed(lambda: only(member)):
            for each in operations:
                assert inside == [member]
                handed(Turn(each))
            assert inside == [member]

    operations = [operation("a", 1), operation("b", 3)]
    bodies = [partial(body, member, operations) for member in range(3)]
    weave(steppers, bodies, schedule_of(*[operations] * 3), in_turn)
    assert inside == []


def test_observing_changes_nothing(steppers: list[Stepper]) -> None:
    log: list[tuple[int, int]] = []
    operations = [operation("a", 1), operation("b", 2)]
    assert observed(body_of(0, operations, log), steppers[0]) == [Turn(each) for each in operations]
    assert log == [(0, 0), (0, 1)]

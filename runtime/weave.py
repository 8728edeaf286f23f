"""Members of a bundle of several programs, run as a schedule says: launch by launch, in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Protocol, cast

from torch_mux.lowering.kernels.interception import Work, intercepted
from torch_mux.lowering.pack.schedule import Place, Schedule, Word
from torch_mux.runtime.steppers import ENDED, Hand, Stepper

__all__ = ["Issuer", "ScheduleDiffers", "in_turn", "observed", "weave"]

Body = Callable[[], object]


class ScheduleDiffers(RuntimeError):
    """A member launched something else than its schedule says; the mix goes on without one."""


class Issuer(Protocol):
    """Carries out the steps of a schedule on a device."""

    def __call__(
        self, members: Sequence[int], works: Sequence[Work], sms: int, beside: bool, /
    ) -> Sequence[Work | None]:
        """Of each of these members, what it is to do itself now; None where all is done.

        Args:
            members: whose work it is; several, whose works match, where it may be one launch.
            sms: multiprocessors the step may take.
            beside: other strands run at the same time.
        """
        ...


def in_turn(members: Sequence[int], works: Sequence[Work], sms: int, beside: bool) -> Sequence[Work | None]:
    """An :class:`Issuer`: everybody does his own."""
    return works


def observed(body: Body, stepper: Stepper) -> list[Work]:
    """Runs ``body`` on ``stepper``; what it launched, in order."""
    found: list[Work] = []

    def note(work: Work) -> Work:
        found.append(work)
        return work

    def run(hand: Hand) -> None:
        with intercepted(note):
            body()

    stepper.begin(run)
    try:
        stepper.step()  # it hands nothing over
    finally:
        stepper.abandon()
    return found


def weave(steppers: Sequence[Stepper], bodies: Sequence[Body], schedule: Schedule, issue: Issuer) -> None:
    """Runs every member's body on its stepper, one at a time, in the order of the schedule.

    A body runs until it is about to launch, and goes on when the schedule has come to that launch: so the
    code of a member is its own plan's, but for launches that ``issue`` makes one or keeps smaller.

    Args:
        steppers: one a member, with nothing under way.

    Raises:
        ScheduleDiffers: a member launches something else.
        Exception: what a body or ``issue`` raised; nothing runs any more then.
    """
    running = list(steppers[: len(bodies)])
    try:
        heads: list[Work | None] = []
        for stepper, body in zip(running, bodies, strict=True):
            stepper.begin(_intercepting(body))
            heads.append(_next(stepper))
        for word in schedule.words:
            for step, sms in _steps(word):
                works = [_expected(heads[member], schedule, (member, index)) for member, index in step]
                members = [member for member, _ in step]
                replies = issue(members, works, sms, len(word.strands) > 1)
                for member, reply in zip(members, replies, strict=True):
                    heads[member] = _next(running[member], reply)
        left = [member for member, head in enumerate(heads) if head is not None]
        if left:
            raise ScheduleDiffers(f"members {left} launch more than their schedule has")
    finally:
        for stepper in running:
            stepper.abandon()


def _intercepting(body: Body) -> Callable[[Hand], object]:
    def run(hand: Hand) -> None:
        with intercepted(hand):
            body()

    return run


def _steps(word: Word) -> Iterator[tuple[tuple[Place, ...], int]]:
    """The steps of a word with their caps: of every strand the first, then of every strand the second."""
    for steps in zip_longest(*(strand.steps for strand in word.strands)):
        for step, strand in zip(steps, word.strands, strict=True):
            if step is not None:
                yield step, strand.sms


def _next(stepper: Stepper, reply: Work | None = None) -> Work | None:
    """What the member launches next, None when it has ended."""
    found = stepper.step(reply)
    return None if found is ENDED else cast(Work, found)


def _expected(head: Work | None, schedule: Schedule, place: Place) -> Work:
    want = schedule.operation(place)
    if head is None or head.operation != want:
        got = "nothing" if head is None else str(head.operation)
        raise ScheduleDiffers(f"member {place[0]} launches {got} where its schedule has {want}")
    return head

"""What whoever holds the dispatcher's role does: sends out what the policy chooses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from torch_mux.runtime.bundle import Bundle
from torch_mux.runtime.companions import as_one, with_companions
from torch_mux.runtime.executors.base import Executor
from torch_mux.runtime.line import Line
from torch_mux.runtime.queues import ProgramQueue
from torch_mux.runtime.request import Request, Waiter
from torch_mux.runtime.runner import Runner
from torch_mux.runtime.scheduler.base import Busy, Decision, Issue, Later, Policy
from torch_mux.settings import Settings

__all__ = ["Driver"]

_QUIET = 2e-3
_POLL = 50e-6
_FLOOD = 2  # bundles
_MOST_MISSES = 6


class Driver:
    """Asks the policy again and again, and does what it says; only the role's holder drives.

    Attributes:
        policy: who goes out together, on which lane.
        resting: whether who drives sleeps until the device, or somebody, is ready.
        interrupt: ends a wait for the device.
    """

    def __init__(
        self,
        executor: Executor,
        policy: Policy,
        clock: Callable[[], float],
        settings: Settings,
        line: Line,
        runner: Runner,
    ) -> None:
        self.policy = policy
        self.resting = False
        self.interrupt = runner.interrupt
        self._executor = executor
        self._clock = clock
        self._line = line
        self._runner = runner
        self._misses = self._skip = 0
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        """Takes over new settings from the next decision on; the mutex is held where somebody may drive."""
        self._settings = settings
        self._line.keep_apart(settings.isolation != "off")

    def interrupt_for(self, queues: Iterable[ProgramQueue]) -> None:
        """Ends a wait for the device if what is pending could begin before it is over; the mutex is held."""
        passes = self._settings.lanes > 1 or self._settings.segment is not None
        ready = [queue for queue in queues if queue.requests and queue.ready]
        if any(passes or not self._executor.at_it(queue.name) for queue in ready):
            self.interrupt.set()

    @property
    def max_bundle(self) -> int:
        """Most requests of one bundle."""
        return self._settings.max_bundle

    @property
    def flooded(self) -> bool:
        """Whether more is pending than the next bundles take: whoever brings more had better help."""
        return self._line.pending > _FLOOD * self._settings.max_bundle

    def hold_nothing(self) -> None:
        """Nobody waits for companions from now on; the mutex is held."""
        self._settings = replace(self._settings, max_wait=0.0, linger=0.0)

    def drive(self, left: Sequence[Request] | None) -> None:
        """Sends out what the policy chooses, until ``left`` have gone out or nothing can."""
        self._ring()
        landed = False  # ends are counted while the next bundle runs, or when they may let one go out
        while self._line.active and not (left is not None and all(request.out for request in left)):
            nap: Waiter | None = None
            with self._runner.mutex:
                now = self._clock()
                decision, bundles = self._next(now)
                if landed and isinstance(decision, (Busy, Later)) and decision.wake is not None:
                    nap = self._line.lie_down(decision.wake)
                    until = min(self._until(decision, now), self._line.alarms.next())
            looked, landed = landed, False
            if bundles:
                self._runner.run(bundles)
            elif not looked:
                self._runner.land(gives_way=True)
                landed = True
            elif decision is None:
                break
            elif nap is not None:
                self._line.rested()
                self._sleep(nap, until - now)
            elif isinstance(decision, Busy):
                with self._resting():
                    self._executor.await_end(self.interrupt)
                if not self.interrupt:
                    self._runner.land(gives_way=True)
                    landed = True
            self._ring()
        if not self._line.active:
            self._line.rested()
        if not self._runner.land(gives_way=True):
            self.send(self._line.pending)

    def send(self, most: int) -> None:
        """Sends out what can go at once, until ``most`` requests have gone; waits for nothing."""
        self._ring()
        while most > 0:
            with self._runner.mutex:
                bundles = self._next(self._clock())[1] if self._line.active else []
            if not bundles:
                break
            most -= sum(len(bundle.requests) for bundle in bundles)
            self._runner.run(bundles)
            self._runner.land()
            self._ring()
        self._runner.land()

    def _next(self, now: float) -> tuple[Decision, list[Bundle]]:
        """What to do, and the bundles that go out now, out of the line; something is pending.

        Where an order had to be kept again and again, it is asked less and less often whether all may go.
        """
        several = 1 < len(self._line.active) <= self._executor.together
        if several and not self._skip:
            bundles = self._all(now)
            if bundles:
                self._misses = 0
                return None, bundles
        decision = self._decide(now)
        if not isinstance(decision, Issue):
            return decision, []
        if several and self._skip:
            self._skip -= 1
        elif several:
            self._misses = min(_MOST_MISSES, self._misses + 1)
            self._skip = (1 << self._misses - 1) - 1
        return decision, self._taken(decision, now)

    def _all(self, now: float) -> list[Bundle]:
        """Bundles of all that is pending, out of the line, where they may go out as one; else none."""
        self._runner.tell()
        view = self._line.view(self._executor.loads())
        issues = self.policy.everything(view, now, self._settings)
        if not issues or not as_one(issues, self._executor):
            return []
        bundles = [self._runner.pop(issue, now) for issue in issues]
        self._line.seen()  # not before: what an interruption leaves in the line is still to be told of
        return bundles

    def _decide(self, now: float) -> Decision:
        self._runner.tell()
        decision = self.policy.form(self._line.view(self._executor.loads()), now, self._settings)
        self._line.seen()
        return decision

    def _taken(self, issue: Issue, now: float) -> list[Bundle]:
        """The bundle of an issue and those that go out with it, out of the line."""
        bundle = self._runner.pop(issue, now)
        if not self._line.active:
            return [bundle]
        take, decide = partial(self._runner.pop, now=now), partial(self._decide, now)
        return with_companions(bundle, decide, take, self._executor, self.policy, now)

    def _until(self, decision: Decision, now: float) -> float:
        """How long to sleep at most; where the end of a bundle is waited for, half the time until then."""
        if isinstance(decision, Later):
            return min(decision.until, now + _QUIET) if self._executor.flying() else decision.until
        end = decision.until if isinstance(decision, Busy) else None
        return now + min(_QUIET, max(_POLL, 0.0 if end is None else (end - now) / 2))

    def _ring(self) -> None:
        """Holds that are over end, and requests whose deadline has passed are dropped."""
        self.interrupt.clear()  # who set it has queued what he came for
        if self._line.alarms:
            with self._runner.mutex:
                expired = self._line.ring(self._clock())
            self._runner.expire(expired)

    def _sleep(self, nap: Waiter, seconds: float) -> None:
        try:
            with self._resting():
                nap.block(seconds)
        finally:
            with self._runner.mutex:
                self._line.get_up()

    @contextlib.contextmanager
    def _resting(self) -> Iterator[None]:
        self.resting = True
        try:
            yield
        finally:
            self.resting = False

"""Mixes of programs on the CPU: the order of a GPU's schedule, every operation its program's own."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from torch_mux.lowering.kernels.operation import Operation
from torch_mux.lowering.pack.kept import schedule_of
from torch_mux.lowering.pack.schedule import Schedule
from torch_mux.runtime.bundle import Bundle
from torch_mux.runtime.mixes import Mix, MixBook, MixState
from torch_mux.runtime.steppers import Stepper
from torch_mux.runtime.weave import ScheduleDiffers, in_turn, observed, weave
from torch_mux.settings import Settings

__all__ = ["Background", "CpuMixes", "at_once"]

log = logging.getLogger(__name__)

#: Has a job done some time.
Background = Callable[[Callable[[], object]], object]

_SMS = 132  # the schedule is the one that a GPU of so many multiprocessors would have


def at_once(job: Callable[[], object]) -> None:
    """A :data:`Background` that waits."""
    job()


class CpuMixes:
    """Runs bundles of several programs operation by operation, as a schedule says.

    A mix is watched once, while its programs run one after another; then its schedule is made in the
    background.
    """

    def __init__(self, background: Background = at_once) -> None:
        self.book = MixBook()
        self._background = background
        self._match = self._keep = True
        self._steppers: list[Stepper] = []

    def configure(self, settings: Settings) -> None:
        """Takes over new settings; schedules made under others are forgotten."""
        self._keep = settings.keep_plans
        self.book.after = settings.pack_after
        if settings.match != self._match:
            self._match = settings.match
            self.book.clear()

    def run(self, bundles: Sequence[Bundle], bodies: Sequence[Callable[[], object]]) -> bool:
        """Runs what each bundle's body does; False if nothing was done, as the mix is not ready."""
        pairs = sorted(zip(bundles, bodies, strict=True), key=lambda pair: pair[0].served.key)
        bundles, bodies = [bundle for bundle, _ in pairs], [body for _, body in pairs]
        key = tuple((bundle.served.key, len(bundle.requests)) for bundle in bundles)
        mix = self.book.see(key, [bundle.served.program.name for bundle in bundles], time.monotonic())
        if mix.schedule is not None and mix.state is MixState.READY:
            return self._woven(mix, mix.schedule, bodies)
        if not mix.worthwhile:
            return False
        self._grow(len(bodies))
        seen = [observed(body, stepper) for body, stepper in zip(bodies, self._steppers, strict=False)]
        members = [[work.operation for work in works] for works in seen]
        mix.state = MixState.BUILDING
        self._background(lambda: self._build(mix, members))
        return True

    def _grow(self, members: int) -> None:
        while len(self._steppers) < members:
            self._steppers.append(Stepper(f"torch_mux-member-{len(self._steppers)}"))

    def _build(self, mix: Mix, members: Sequence[Sequence[Operation]]) -> None:
        try:
            mix.schedule = schedule_of(members, _SMS, match=self._match, keep=self._keep)
            mix.state = MixState.READY
        except Exception as error:
            log.exception("the mix of %s has no schedule", ", ".join(mix.names))
            mix.failed(error)

    def _woven(self, mix: Mix, schedule: Schedule, bodies: Sequence[Callable[[], object]]) -> bool:
        try:
            weave(self._steppers, bodies, schedule, in_turn)
        except ScheduleDiffers as error:
            log.warning("the mix of %s goes on without a schedule: %s", ", ".join(mix.names), error)
            mix.failed(error)
            return False
        mix.joint += 1
        return True

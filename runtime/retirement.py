"""Plans that turn slow or keep raising are retired: their programs run per instance for a while.

The other path is slower and its bits may differ: it is for a plan whose code or tables went wrong, not for a
busy device. So a plan has to be many times slower than it was, bundle after bundle, by the device's own
clock, while other programs are not.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final
from weakref import WeakKeyDictionary

from torch_mux.errors import MuxError
from torch_mux.runtime.memory import out_of_memory
from torch_mux.runtime.served import ServedProgram
from torch_mux.types import FallbackKind, FallbackReason

__all__ = ["Retirement"]

logger = logging.getLogger(__name__)

_RUN: Final = 8
_PROBATION: Final = 2
_WINDOW: Final = 16
_FIRST: Final = 10.0
_MOST: Final = 640.0
_RECENT: Final = 1.0


@dataclass
class _Size:
    """Device seconds of the last bundles of one size, and their least median so far."""

    last: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    usual: float = float("inf")

    def add(self, seconds: float) -> None:
        self.last.append(seconds)
        if len(self.last) >= _RUN:
            self.usual = min(self.usual, sorted(self.last)[len(self.last) // 2])


@dataclass
class _Watch:
    """One coalesced plan.

    Attributes:
        slow, raised: bundles in a row.
        bad: bundles in a row after which it is retired; few after it was tried again.
        reason: why it is to be retired, once the other plan is there.
        again: when that is made again, where it could not be made; and the seconds until the next time.
        pause: seconds for which it is retired next.
        since, until: when it was retired, and until when.
        seen, ratio: the last bundle, and how many times its usual time it took.
    """

    sizes: dict[int, _Size] = field(default_factory=dict)
    slow: int = 0
    raised: int = 0
    good: int = 0
    bad: int = _RUN
    reason: FallbackReason | None = None
    again: float | None = None
    wait: float = _FIRST
    pause: float = _FIRST
    since: float = 0.0
    until: float = 0.0
    seen: float = float("-inf")
    ratio: float = 1.0


class Retirement:
    """Watches the coalesced plans of a device; only the holder of the dispatcher's role uses it.

    Args:
        changed: told when a program runs on another plan from now on.

    Attributes:
        factor: how many times its usual device time a slow bundle takes; 0: none is slow.
    """

    def __init__(self, changed: Callable[[ServedProgram], object]) -> None:
        self.factor = 0.0
        self._changed = changed
        self._watches: WeakKeyDictionary[ServedProgram, _Watch] = WeakKeyDictionary()

    def turn(self, served: ServedProgram, now: float) -> None:
        """A bundle of the program is about to run: retires its plan, or tries it again, if it is time."""
        watch = self._watches.get(served)
        if watch is None:
            return
        if served.retired is None:
            if watch.reason is not None and served.detour is None:
                self._make_again(served, watch, now)
            elif watch.reason is not None:
                watch.since, watch.until = now, now + watch.pause
                watch.pause = min(_MOST, 2 * watch.pause)
                served.take(watch.reason)
                watch.reason = None
                logger.warning("a plan rests for %g s: %s", watch.until - now, served.retired)
                self._changed(served)
        elif not watch.since <= now < watch.until:
            watch.slow = watch.raised = watch.good = 0
            watch.bad = _PROBATION
            served.take(None)
            logger.info("%s runs coalesced again, on trial", served.program.name)
            self._changed(served)

    def _make_again(self, served: ServedProgram, watch: _Watch, now: float) -> None:
        """The other plan is not there: if it could not be made, that is tried again, later each time."""
        stuck = served.stuck
        if stuck is None or watch.reason is None:
            return
        if watch.again is None:
            detail = f"{stuck.detail}; it is tried again after {watch.wait:g} s"
            served.stuck = replace(stuck, detail=detail)
            watch.again, watch.wait = now + watch.wait, min(_MOST, 2 * watch.wait)
        elif not watch.again - watch.wait <= now < watch.again:
            watch.again = served.stuck = None
            served.make_detour(watch.reason)

    def ran(self, served: ServedProgram, slots: int, seconds: float | None, now: float) -> None:
        """A bundle of a coalesced plan ended well after ``seconds`` of the device; None: nobody measured."""
        watch = self._watch(served)
        watch.raised = 0
        if seconds is not None and self._slow(watch, slots, seconds, now):
            watch.good = 0
            watch.slow += 1
            if watch.slow >= watch.bad:
                usual = watch.sizes[slots].usual
                self._retire(served, f"bundles of {slots} take {seconds:.3g} s, usually {usual:.3g} s")
            return
        watch.slow = 0
        watch.good += 1
        if watch.good == _RUN and watch.reason is not None and served.detour is None:
            # It recovered before there was another; that one may come yet, and serves the next time.
            watch.reason = watch.again = served.stuck = None
            watch.wait = _FIRST
        if watch.good == _RUN and watch.bad == _PROBATION:
            watch.bad, watch.pause = _RUN, _FIRST

    def _slow(self, watch: _Watch, slots: int, seconds: float, now: float) -> bool:
        size = watch.sizes.get(slots)
        if size is None:
            size = watch.sizes[slots] = _Size()
        factor, known = self.factor, size.usual < float("inf")
        watch.seen, watch.ratio = now, seconds / size.usual if known else 1.0
        if not factor or not known or watch.ratio <= factor:
            size.add(seconds)
            return False
        # Where others are slow too it is the device.
        return not any(
            other is not watch and now - _RECENT < other.seen and other.ratio > factor / 2
            for other in self._watches.values()
        )

    def failed(self, served: ServedProgram, error: Exception) -> None:
        """A bundle of a coalesced plan raised."""
        if isinstance(error, MuxError) or out_of_memory(error):
            return
        watch = self._watch(served)
        watch.good = 0
        watch.raised += 1
        if watch.raised >= watch.bad:
            self._retire(served, f"it raised {watch.raised} times in a row: {type(error).__name__}: {error}")

    def _retire(self, served: ServedProgram, detail: str) -> None:
        watch = self._watch(served)
        watch.slow = watch.raised = 0
        if served.retired is None and watch.reason is None:
            watch.reason = FallbackReason(FallbackKind.RETIRED, served.program.name, detail)
            if served.detour is None:
                served.make_detour(watch.reason)

    def _watch(self, served: ServedProgram) -> _Watch:
        watch = self._watches.get(served)
        if watch is None:
            watch = self._watches[served] = _Watch()
        return watch

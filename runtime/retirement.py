"""Plans that turn slow or keep raising are retired: their programs run per instance for a while.

The other path is slower and its bits may differ: it is for a plan whose code or tables went wrong, not for a
busy device or host. So a plan has to be many times slower than it was, bundle after bundle, by the device's
own clock, while other programs are not. A bundle is compared only with those of its size that ran in the same
way: within the same cap, on the same kind of lane, from the same graphs.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Final
from weakref import WeakKeyDictionary

from torch_mux.errors import MuxError
from torch_mux.runtime.bundle import Bundle
from torch_mux.runtime.executors.base import Flight
from torch_mux.runtime.memory import out_of_memory
from torch_mux.runtime.served import ServedProgram
from torch_mux.types import FallbackKind, FallbackReason

__all__ = ["Retirement"]

logger = logging.getLogger(__name__)

_RUN: Final = 8
_PROBATION: Final = 2
_WINDOW: Final = 16
#: Of sizes and ways of one plan; the oldest are forgotten.
_KINDS: Final = 1024
_FIRST: Final = 10.0
_MOST: Final = 640.0
_RECENT: Final = 1.0
#: Of its time, charged to a bundle that had the device to itself.
_ALONE: Final = 0.9
#: Caps that are told apart.
_CAPS: Final = 256


@dataclass
class _Size:
    """Device seconds of the last bundles of one size that ran in one way, and their least median so far."""

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
        seen, ratio: the last bundle that could be compared, and how many times its usual time it took.
    """

    sizes: dict[tuple[int, Hashable], _Size] = field(default_factory=dict)
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

    def ended(
        self, bundle: Bundle, ended: float, seconds: float, charge: float, flight: Flight | None
    ) -> None:
        """A bundle ended well at ``ended``; it may be slow only if it had the device to itself.

        Args:
            seconds, charge: that it took, and that are its own.
        """
        slots = len(bundle.requests)
        # Beside a long one a short bundle takes many times what it usually does: that is no fault of its.
        if flight is None or flight.way is None or charge < _ALONE * seconds:
            self.ran(bundle.served, slots, None, ended)
            return
        way = math.ceil(_CAPS * bundle.limit), flight.way
        self.ran(bundle.served, slots, seconds, ended, way, flight.delayed or flight.paused > 0.0)

    def ran(
        self,
        served: ServedProgram,
        slots: int,
        seconds: float | None,
        now: float,
        way: Hashable = (),
        delayed: bool = False,
    ) -> None:
        """A bundle of a coalesced plan ended well.

        Args:
            seconds: of the device that it took; None: nobody measured, or it ran in a way of its own.
            way: how it ran, besides its size.
            delayed: whether something else may have made it longer, so that it tells how long such a bundle
                takes at most, and not that it is slow.
        """
        watch = self._watch(served)
        watch.raised = 0
        ratio = None if seconds is None else self._ratio(watch, (slots, way), seconds, now, delayed)
        if seconds is not None and ratio is not None and self.factor and ratio > self.factor:
            if delayed:
                return
            if self._all_slow(watch, now):
                watch.slow = 0
                return
            watch.good = 0
            watch.slow += 1
            if watch.slow >= watch.bad:
                self._retire(
                    served, f"bundles of {slots} take {seconds:.3g} s, usually {seconds / ratio:.3g} s"
                )
            return
        if ratio is not None:
            watch.slow = 0
        watch.good += 1
        if watch.good == _RUN and watch.reason is not None and served.detour is None:
            # It recovered before there was another; that one may come yet, and serves the next time.
            watch.reason = watch.again = served.stuck = None
            watch.wait = _FIRST
        if watch.good == _RUN and watch.bad == _PROBATION:
            watch.bad, watch.pause = _RUN, _FIRST

    def _ratio(
        self, watch: _Watch, kind: tuple[int, Hashable], seconds: float, now: float, delayed: bool
    ) -> float | None:
        """How many times as long as usual it took, if that is known. Learns from what is not slow."""
        size = watch.sizes.get(kind)
        if size is None:
            while len(watch.sizes) >= _KINDS:
                del watch.sizes[next(iter(watch.sizes))]
            size = watch.sizes[kind] = _Size()
        ratio = seconds / size.usual if size.usual < float("inf") else None
        if ratio is not None and not delayed:
            watch.seen, watch.ratio = now, ratio
        if ratio is None or not self.factor or ratio <= self.factor:
            size.add(seconds)
        return ratio

    def _all_slow(self, watch: _Watch, now: float) -> bool:
        """Where other programs are slow too it is the device."""
        return any(
            other is not watch and now - _RECENT < other.seen and other.ratio > self.factor / 2
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

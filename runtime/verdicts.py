"""Which way a mix runs, by measurement: its programs' own plans beside each other, or one plan for all."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import Final

from torch_mux.lowering import kept

__all__ = ["MixRun", "Verdict", "read", "write"]

log = logging.getLogger(__name__)

_FOLDER: Final = "mixes"
#: Measurements of each way before they are compared, and of which the median counts.
ENOUGH: Final = 5
_KEPT: Final = 9
#: The other way takes over when it needs so much of the time.
MARGIN: Final = 0.97
#: The way that lost is measured again once in so many bundles.
AGAIN: Final = 256


class Verdict:
    """Decides between the two ways of a mix by the device time that its bundles took.

    Both take turns until each was measured :data:`ENOUGH` times; the first of each does not count, since it
    may include what happens once. From then on the faster one is used. The other one takes over when its
    median is below :data:`MARGIN` of the first's, and is measured again now and then.
    """

    def __init__(self) -> None:
        self._times: dict[bool, deque[float]] = {way: deque(maxlen=_KEPT) for way in (False, True)}
        self._asked = {False: 0, True: 0}
        self._dropped: set[bool] = set()
        self._since = 0
        self.joint: bool | None = None

    @classmethod
    def known(cls, own: float, joint: float) -> Verdict:
        """What was decided before: seconds of each way."""
        found = cls()
        found._dropped = {False, True}
        for way, seconds in ((False, own), (True, joint)):
            found._times[way].extend([seconds] * ENOUGH)
        found.joint = joint < MARGIN * own
        return found

    def seconds(self, joint: bool) -> float | None:
        """The median of one way, None before it was measured."""
        times = self._times[joint]
        return median(times) if times else None

    def next(self) -> bool:
        """Whether the next bundle of the mix goes out by the joint plan, which is there."""
        if self.joint is None:
            way = self._asked[True] <= self._asked[False]
            self._asked[way] += 1
            return way
        self._since += 1
        if self._since < AGAIN:
            return self.joint
        self._since = 0
        return not self.joint

    def observe(self, joint: bool, seconds: float) -> bool:
        """A bundle of the mix took ``seconds`` of the device; whether that decided something."""
        if self._asked[True] and joint not in self._dropped:
            self._dropped.add(joint)
            if not joint:
                self._times[False].clear()  # from before the joint plan was there
            return False
        self._times[joint].append(seconds)
        if any(len(times) < ENOUGH for times in self._times.values()):
            return False
        own, other = median(self._times[False]), median(self._times[True])
        before, ratio = self.joint, other / own if own > 0.0 else 1.0
        if self.joint:
            self.joint = ratio < 1.0 / MARGIN
        else:
            self.joint = ratio < MARGIN
        return self.joint is not before

    @property
    def text(self) -> str:
        """The times and what follows from them, for people."""
        own, joint = self.seconds(False), self.seconds(True)
        parts = [
            f"{name} {seconds * 1e6:.0f} us"
            for name, seconds in (("own plans beside each other", own), ("one plan", joint))
            if seconds is not None
        ]
        if self.joint is None:
            return "measured: " + ", ".join(parts) + "; not decided yet" if parts else ""
        return (
            "measured: " + ", ".join(parts) + ("; one plan is used" if self.joint else "; own plans are used")
        )


class MixRun:
    """Bundles of one mix that went out at one moment, until the last has ended.

    Args:
        joint: they went out as one.
        members: how many they are.
        ended: told ``joint`` and their device seconds together, when all have ended without an error.
    """

    def __init__(self, joint: bool, members: int, ended: Callable[[bool, float], object]) -> None:
        self._joint = joint
        self._left = members
        self._seconds = 0.0
        self._ended = ended

    def landed(self, seconds: float, failed: bool) -> None:
        """One of them ended; ``seconds`` of the device's busy time were its own."""
        if failed:
            self._left = -1  # it never comes to an end
        self._left -= 1
        self._seconds += seconds
        if self._left == 0:
            self._ended(self._joint, self._seconds)


def read(name: str) -> Verdict | None:
    """What an earlier process decided of the mix of that name, see :func:`kept.digest_of`; None: nothing."""
    try:
        payload = kept.read(_FOLDER, name)
        if payload is None:
            return None
        data = json.loads(payload)
        own, joint = float(data["own"]), float(data["joint"])
    except (kept.Damaged, ValueError, KeyError, TypeError) as error:
        log.info("what was measured of a mix cannot be read and is measured again: %s", error)
        return None
    return Verdict.known(own, joint) if own > 0.0 and joint > 0.0 else None


def write(name: str, verdict: Verdict) -> None:
    """Leaves the times of both ways for later processes."""
    own, joint = verdict.seconds(False), verdict.seconds(True)
    if own is None or joint is None:
        return
    try:
        kept.write(_FOLDER, name, json.dumps({"own": own, "joint": joint}).encode())
    except OSError as error:
        log.info("what was measured of a mix was not kept on disk: %s", error)

"""Device time of bundles that overlap on different lanes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from operator import attrgetter

from torch_mux.runtime.executors.base import Flight
from torch_mux.runtime.shares import PICOSECONDS, divided

__all__ = ["BusyTime"]

_NEVER = float("inf")
_PARTS = 1_000_000
_ended = attrgetter("ended")


class BusyTime:
    """Divides the time in which a device is busy among the bundles on it.

    A device is busy while a bundle is at work on any lane. Each moment is divided among the bundles that are
    at work then, in proportion to their caps; bundles that are one have one cap, and their parts by
    their work. So the sum over bundles is the busy time and not that of
    every lane. One that is alone on the device is charged what it took. While a bundle goes before others,
    which stop for it, the time is its own, and theirs is ``paused``.
    """

    def __init__(self) -> None:
        self._until = -_NEVER

    def divide(self, landed: Sequence[Flight], at_work: Sequence[Flight]) -> None:
        """Adds to the ``charge`` of these flights what passed until the last of ``landed`` ended.

        Args:
            landed: flights that ended since the last call.
            at_work: those that the lanes are busy with now.
        """
        for flight in landed:
            flight.began = flight.ended - flight.seconds
        lanes = {flight.bundle.lane for flight in (*landed, *at_work)}
        if len(lanes) > 1 or any(flight.charge or flight.paused for flight in landed):
            self._sweep(sorted(landed, key=_ended), at_work)
            return
        # Bundles of one lane follow each other: nothing is divided.
        for flight in landed:
            flight.charge = round(flight.seconds * flight.bundle.part * PICOSECONDS)
            self._until = max(self._until, flight.ended)

    def _sweep(self, landed: Sequence[Flight], at_work: Iterable[Flight]) -> None:
        if not landed:
            return
        begun, ended = landed[0].began, landed[-1].ended
        others = [flight for flight in at_work if flight.began < ended]
        if not others and all(flight.began == begun and flight.ended == ended for flight in landed):
            # Bundles that are one, and nothing beside them.
            time = round((ended - max(begun, self._until)) * PICOSECONDS)
            if time > 0:
                _charge(landed, time)
            self._until = max(self._until, ended)
            return
        spans = [(flight.began, flight.ended, flight) for flight in landed]
        spans += [(flight.began, _NEVER, flight) for flight in at_work]
        for last in landed:
            first = max(self._until, min(began for began, _, _ in spans))
            inside = {began for began, _, _ in spans if first < began < last.ended}
            for begin, end in pairwise(sorted({first, *inside, last.ended})):
                here = [flight for began, ended, flight in spans if began <= begin and ended >= end]
                if here and begin >= first:
                    _charge(here, round((end - begin) * PICOSECONDS))
            self._until = max(self._until, last.ended)


def _charge(flights: Sequence[Flight], time: int) -> None:
    passing = [flight for flight in flights if flight.bundle.issue.passes]
    if passing:
        for flight in flights:
            if not flight.bundle.issue.passes:
                flight.paused += time / PICOSECONDS
        flights = passing
    weights = [flight.bundle.share * flight.bundle.part for flight in flights]
    parts = divided(time, [max(1, round(weight * _PARTS)) for weight in weights])
    for flight, part in zip(flights, parts, strict=True):
        flight.charge += part

"""The adaptive linger: clients who call in a loop are awaited, so that they go out together again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch_mux.runtime.scheduler.base import Queue, Ticket
from torch_mux.settings import Settings

__all__ = ["Cohorts"]

_MOST_MISSES = 6


@dataclass
class _Cohort:
    """The clients of a program's last bundle, who may be back at once if they call in a closed loop."""

    clients: frozenset[int] = field(default_factory=frozenset)
    under_way: int = 0
    ended: float = float("-inf")
    seconds: float = 0.0
    misses: int = 0
    skip: int = 0


class Cohorts:
    """For how long a program's requests are held for companions.

    ``max_wait`` holds a request for companions. And when several clients shared the last bundle of a program
    and some of them are not back, their cohort is awaited: while the device is busy with it, and then for at
    most ``linger`` seconds or the duration of that bundle. Without it closed-loop clients split into two
    cohorts that take turns. A client alone is never held, and clients who stop coming back are awaited less
    and less often.
    """

    def __init__(self) -> None:
        self._cohorts: dict[str, _Cohort] = {}

    def awaited(self, queue: Queue, now: float, settings: Settings) -> tuple[float | None, int] | None:
        """(until when, how many) companions to wait for; no time: until their bundle has ended."""
        if queue.slots == 1:
            return None
        if settings.max_wait > 0.0:
            arrival = next(iter(queue.requests)).arrival
            moment = arrival + settings.max_wait
            if arrival <= now < moment:  # a clock that was put back ends the wait
                return moment, settings.max_bundle
        cohort = self._cohorts.get(queue.key)
        if cohort is None or cohort.skip or len(cohort.clients) < 2 or settings.linger <= 0.0:
            return None
        moment = cohort.ended + min(settings.linger, cohort.seconds)
        if cohort.under_way == 0 and not cohort.ended <= now < moment:
            return None
        missing = _missing(cohort, queue.requests)
        if not missing:
            return None
        return (None if cohort.under_way else moment), missing

    def issued(self, key: str, requests: Sequence[Ticket]) -> None:
        """Learns whether the cohort came back, and takes the bundle's clients as the next one."""
        cohort = self._cohorts.get(key)
        if cohort is None:
            cohort = self._cohorts[key] = _Cohort()
        if cohort.skip:
            cohort.skip -= 1
        elif len(cohort.clients) > 1:
            cohort.misses = min(_MOST_MISSES, cohort.misses + 1) if _missing(cohort, requests) else 0
            cohort.skip = (1 << (cohort.misses - 1)) - 1 if cohort.misses else 0
        cohort.clients = frozenset([request.client for request in requests])
        cohort.under_way += 1

    def completed(self, key: str, now: float, seconds: float) -> None:
        """Starts the linger of that program's cohort."""
        cohort = self._cohorts.get(key)
        if cohort is not None:
            cohort.under_way = max(0, cohort.under_way - 1)
            cohort.ended = now
            cohort.seconds = seconds

    def forget(self, key: str) -> None:
        """Drops what is known of a program's clients."""
        self._cohorts.pop(key, None)


def _missing(cohort: _Cohort, requests: Iterable[Ticket]) -> int:
    return len(cohort.clients.difference([request.client for request in requests]))

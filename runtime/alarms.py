"""Moments at which something has to happen to a request: its hold ends, or its deadline has passed."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from itertools import count

from torch_mux.runtime.request import Request

__all__ = ["Alarms"]

_NEVER = float("inf")
_KEPT = 64


class _Alarm:
    """What rings: a request, or nobody any more."""

    __slots__ = ("request",)

    def __init__(self, request: Request) -> None:
        self.request: Request | None = request


class Alarms:
    """A heap of moments of those who are in line. Whoever has left it is forgotten and not kept alive."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, _Alarm]] = []
        self._own: dict[Request, tuple[_Alarm, ...]] = {}
        self._numbers = count()
        self._prune_at = _KEPT
        self._seen = -_NEVER

    def __bool__(self) -> bool:
        return bool(self._heap)

    def __len__(self) -> int:
        return len(self._heap)

    def set(self, moment: float, request: Request) -> None:
        """Rings for ``request`` at ``moment``, seconds on the clock."""
        if len(self._heap) >= self._prune_at:
            self._heap = [entry for entry in self._heap if entry[2].request is not None]
            heapq.heapify(self._heap)
            self._prune_at = max(_KEPT, 2 * len(self._heap))
        alarm = _Alarm(request)
        self._own[request] = (*self._own.get(request, ()), alarm)
        heapq.heappush(self._heap, (moment, next(self._numbers), alarm))

    def forget(self, requests: Iterable[Request]) -> None:
        """These have left the line."""
        if self._own:
            for request in requests:
                for alarm in self._own.pop(request, ()):
                    alarm.request = None

    def peek(self) -> float:
        """When the first one was set for, which may have been passed over; takes no lock."""
        try:
            return self._heap[0][0]
        except IndexError:
            return _NEVER

    def next(self) -> float:
        """When the next one rings, or never."""
        while self._heap and self._heap[0][2].request is None:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else _NEVER

    def ring(self, now: float) -> list[Request]:
        """The requests whose moment has come, in order. A clock that was put back moves all of them."""
        if now < self._seen:
            self._move(now - self._seen)
        self._seen = now
        rung: list[Request] = []
        while self.next() <= now:
            request = heapq.heappop(self._heap)[2].request
            if request is not None:
                rung.append(request)
        return rung

    def _move(self, by: float) -> None:
        self._heap = [(moment + by, number, alarm) for moment, number, alarm in self._heap]
        for request in self._own:
            request.eligible += by
            request.expires += by
            request.due += by

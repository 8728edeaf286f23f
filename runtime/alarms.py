"""Moments at which something has to happen to a request: its hold ends, or its deadline has passed."""

from __future__ import annotations

import heapq

from torch_mux.runtime.request import Request, RequestState

__all__ = ["Alarms"]

_NEVER = float("inf")


class Alarms:
    """A heap of moments; what has gone out or ended meanwhile is passed over."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Request]] = []

    def __bool__(self) -> bool:
        return bool(self._heap)

    def set(self, moment: float, request: Request) -> None:
        """Rings for ``request`` at ``moment``, seconds on the clock."""
        heapq.heappush(self._heap, (moment, request.seq, request))

    def peek(self) -> float:
        """When the first one was set for, which may have been passed over; takes no lock."""
        try:
            return self._heap[0][0]
        except IndexError:
            return _NEVER

    def next(self) -> float:
        """When the next one rings, or never."""
        while self._heap and self._heap[0][2].state is not RequestState.QUEUED:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else _NEVER

    def ring(self, now: float) -> list[Request]:
        """The requests whose moment has come, in order."""
        rung: list[Request] = []
        while self.next() <= now:
            rung.append(heapq.heappop(self._heap)[2])
        return rung

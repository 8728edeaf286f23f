"""Who cannot wait for another bundle any more, and how large a bundle he can be part of."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch_mux.runtime.scheduler.base import Queue, Ticket
from torch_mux.runtime.scheduler.pending import Flow

__all__ = ["Urgent", "attainable", "latest_start", "urgent"]

_NEVER = float("inf")
#: Timers wake up late.
_MARGIN = 500e-6


class Urgent(NamedTuple):
    """A flow whose first request would be late behind another bundle, and is not if it goes out now."""

    due: float
    seq: int
    flow: Flow
    head: Ticket


def urgent(queue: Queue, begin: float, alone: float, longest: float) -> list[Urgent]:
    """The urgent flows of a queue, earliest deadline first.

    Who would be late even alone is not among them: hurrying him would only make others late as well.

    Args:
        begin: seconds on the clock when a bundle that goes out now would begin.
        alone: device seconds of a bundle of one.
        longest: device seconds of the longest bundle that could go first.
    """
    if queue.due - begin - alone >= longest:
        return []
    found: list[Urgent] = []
    for flow, tickets in queue.flows().items():
        head = next(iter(tickets))
        if head.due < _NEVER and 0.0 <= head.due - begin - alone < longest:
            found.append(Urgent(head.due, head.seq, flow, head))
    return sorted(found)


def latest_start(queue: Queue, begin: float, alone: float) -> float:
    """Until when the queue may be held for companions without making anybody late; or never."""
    latest = _NEVER
    for tickets in queue.flows().values():
        slack = next(iter(tickets)).due - begin - alone
        if slack >= 0.0:
            latest = min(latest, begin + slack - _MARGIN)
    return latest


def attainable(limit: int, room: float, seconds: Callable[[int], float]) -> int:
    """The most slots, at least 1, of a bundle that takes at most ``room``.

    Args:
        seconds: what a bundle of so many slots will take.
    """
    while limit > 1 and seconds(limit) > room:
        limit -= 1
    return limit

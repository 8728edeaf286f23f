"""The most requests of a trace that could have met their deadline, by a scheduler that knows the future."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["most_in_time"]


def most_in_time(arrivals: Sequence[float], deadline: float, seconds: Sequence[float]) -> int:
    """The most requests that one device can serve within ``deadline`` seconds of their arrival, exactly.

    All deadlines are equally long, so an optimal schedule serves in order of arrival, and a bundle takes
    requests that follow each other: exchanging one for a later one that is pending too never hurts. What
    remains is a dynamic programme over (requests seen, requests dropped) whose value is the earliest moment
    at which the device can be free (one batching machine with agreeable release times and due dates; after
    Brucker and others, "Scheduling a batching machine", 1998).

    Args:
        arrivals: seconds, in ascending order.
        seconds: of bundles of 1, 2, ... requests, in ascending order.
    """
    count, dropped = len(arrivals), 32
    while True:
        found = _fewest_dropped(arrivals, deadline, seconds, min(dropped, count))
        if found is not None:
            return count - found
        dropped *= 8


def _fewest_dropped(
    arrivals: Sequence[float], deadline: float, seconds: Sequence[float], most: int
) -> int | None:
    """How few requests must be dropped; None if more than ``most``."""
    count, width = len(arrivals), len(seconds)
    times = torch.tensor(arrivals, dtype=torch.float64)
    last = times + deadline
    # takes[i]: seconds of a bundle of width - i requests: the earliest of them in the first row.
    takes = torch.tensor(list(reversed(seconds)), dtype=torch.float64)[:, None]
    free = torch.full((count + 1, most + 1), float("inf"), dtype=torch.float64)
    free[0, 0] = 0.0
    for end in range(1, count + 1):
        first = max(0, end - width)
        ends = free[first:end].clamp_min(times[end - 1]) + takes[width - (end - first) :]
        row = _earliest(ends, last[first:end, None])
        row[1:] = torch.minimum(row[1:], free[end - 1, :-1])
        free[end] = row
    good = torch.isfinite(free[count]).nonzero()
    return int(good[0]) if len(good) else None


def _earliest(ends: Tensor, due: Tensor) -> Tensor:
    """Over bundles that are in time for their first request, the earliest end by number of drops."""
    return ends.masked_fill_(ends > due, float("inf")).amin(0)

"""Which captured sizes serve a bundle of a size without a graph of its own."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

__all__ = ["cover", "worth_waiting"]

#: What a replay costs besides its slots, in slots: its launches, and what is read once whatever the number.
_REPLAY: Final = 8
#: Replays of one bundle, at most: each costs the host an enqueued copy and a launch.
_MOST: Final = 16
#: How much more than its own graph other graphs may cost before that is captured at once.
_DEAR: Final = 2


@lru_cache(maxsize=4096)
def cover(slots: int, sizes: frozenset[int]) -> tuple[int, ...]:
    """The sizes of the graphs to replay one after another, the largest first; empty where there are none.

    Slots that are left over stay idle, so a graph costs its size, and each replay something besides. Of all
    ways the cheapest: one larger graph, or several smaller ones, which a few slots beside a large graph are
    better served by.

    Args:
        slots: of the bundle.
        sizes: that are captured.
    """
    larger = min((size for size in sizes if size >= slots), default=0)
    if larger and larger <= slots + _REPLAY:
        return (larger,)  # two replays cost as much
    ways = [size for size in sizes if size < slots] + [larger] * bool(larger)
    if not ways:
        return ()
    #: The least cost of so many slots, the replays of that, and the size of one of them.
    best = [(0, 0, 0)]
    for count in range(1, slots + 1):
        best.append(
            min(
                (_REPLAY + size + rest[0], 1 + rest[1], size)
                for size in ways
                for rest in (best[max(0, count - size)],)
            )
        )
    found: list[int] = []
    left = slots
    while left > 0:
        found.append(best[left][2])
        left -= found[-1]
    return tuple(sorted(found, reverse=True)) if len(found) <= _MOST else ()


def worth_waiting(slots: int, sizes: tuple[int, ...]) -> bool:
    """Whether these graphs serve so many slots well enough until their own is worth a capture."""
    return bool(sizes) and sum(_REPLAY + size for size in sizes) <= _DEAR * (_REPLAY + slots)

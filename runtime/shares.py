"""A bundle's device time divided among its slots, to the last picosecond."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

__all__ = ["PICOSECONDS", "divided"]

#: In a second: whole numbers of them add up exactly, and one is nothing to a slot.
PICOSECONDS = 10**12


def divided(total: int, works: Sequence[int]) -> list[int]:
    """Whole parts of ``total`` in proportion to ``works``, each within 1 of its share; the sum is ``total``.

    Args:
        total: what is divided, for example picoseconds.
        works: the work of each slot, at least 1.
    """
    whole = sum(works)
    ends = [total * reached // whole for reached in accumulate(works)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]

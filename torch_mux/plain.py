"""Values that may stand in a learned signature or result: immutable, compared by value."""

from __future__ import annotations

import torch

__all__ = ["CONSTANTS", "alike"]

CONSTANTS = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), torch.dtype, torch.device)
"""Types of plain values."""


def alike(one: object, other: object) -> bool:
    """Whether one may stand for the other: the same object, or equal plain values of one type.

    By their text: ``0.0`` and ``-0.0`` differ, a NaN is like itself.
    """
    if one is other:
        return True
    return type(one) is type(other) and type(one) in CONSTANTS and repr(one) == repr(other)

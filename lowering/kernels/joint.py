# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,unused-ignore"
"""What launches for several programs share: values picked by member, and how such launches are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import triton
import triton.language as tl

from torch_mux.lowering.kernels.common import Launch
from torch_mux.lowering.kernels.data import BitClass
from torch_mux.lowering.kernels.operation import Operation

__all__ = ["MOST_MEMBERS", "Sizes", "arguments_of", "matching", "numbered", "pick", "vector_of"]

Sizes = Sequence[tuple[int, int, int]]

#: Programs whose layers one launch takes.
MOST_MEMBERS: Final = 4


@triton.jit
def pick(member, values, MEMBERS: tl.constexpr):
    """The one of the first MEMBERS values that belongs to ``member``."""
    value = values[0]
    if MEMBERS > 1:
        value = tl.where(member == 1, values[1], value)
    if MEMBERS > 2:
        value = tl.where(member == 2, values[2], value)
    if MEMBERS > 3:
        value = tl.where(member == 3, values[3], value)
    return value


@triton.jit
def vector_of(member, arenas, widths, line, offset, MEMBERS: tl.constexpr):
    """Where the vector of a slot of ``member`` begins."""
    return pick(member, arenas, MEMBERS) + line * pick(member, widths, MEMBERS) + offset


def numbered(names: Sequence[str]) -> list[str]:
    """The kernel's parameters of these names: one a member."""
    return [f"{name}{member}" for name in names for member in range(MOST_MEMBERS)]


def matching(launches: Sequence[Launch]) -> tuple[list[Launch], Operation, BitClass]:
    """The launches, those of long reductions first; what all of them compute together; and its bit class.

    Raises:
        ValueError: operations that do not match, or too few or too many of them.
    """
    if not 2 <= len(launches) <= MOST_MEMBERS:
        raise ValueError(f"one launch takes 2 to {MOST_MEMBERS} programs' operations, not {len(launches)}")
    launches = sorted(launches, key=lambda launch: -max(k for _, _, k in launch.operation.sizes))
    operations = [launch.operation for launch in launches]
    bit_class = operations[0].bit_class
    if bit_class is None or any(not operations[0].matches(other) for other in operations):
        raise ValueError(f"these do not match: {', '.join(map(str, operations))}")
    sizes = tuple(size for each in operations for size in each.sizes)
    channels = tuple(count for each in operations for count in each.channels)
    return launches, replace(operations[0], sizes=sizes, channels=channels), bit_class


def arguments_of(
    members: Sequence[Mapping[str, Any]], pointers: Sequence[str], numbers: Sequence[str]
) -> dict[str, Any]:
    """The arguments of all members under numbered names; None and 0 for members that there are not."""
    found: dict[str, Any] = {}
    for member in range(MOST_MEMBERS):
        own = members[member] if member < len(members) else None
        found |= {f"{name}{member}": None if own is None else own[name] for name in pointers}
        found |= {f"{name}{member}": 0 if own is None else own[name] for name in numbers}
    return found

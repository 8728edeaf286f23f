"""Where the programs of a kernel run."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["places"]


@triton.jit  # type: ignore[misc]
def _places(found, steps):  # type: ignore[no-untyped-def]
    place = tl.program_id(0)
    number = tl.inline_asm_elementwise("mov.u32 $0, %smid;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    # Long enough for every multiprocessor to be needed.
    total = number
    for step in range(steps):
        total = total * 3 + step
    tl.store(found + place, tl.where(total == -7, total, number))


def places(found: Tensor) -> None:
    """Writes into ``found``, int32 [programs], the multiprocessor that each program ran on."""
    _places[(found.shape[0],)](found, 20_000)

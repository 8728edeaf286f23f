"""``mux::block`` and ``mux::slot_block``: three convolutions in a row, of one slot and of a bundle.

On CUDA a bundle's are one super-kernel launch. On the CPU they are the three convolutions of a bundle, and
take turns as those do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from ..kernels.data import Vector
from .semantic import LIBRARY, convolution
from .slots import SLOT_CONVOLUTION

__all__ = ["BLOCK", "SLOT_BLOCK"]

LIBRARY.define(
    "block(Tensor x, Tensor[] weights, Tensor[] scales, Tensor[] shifts, Tensor residual) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "slot_block(Tensor x, Tensor table, Tensor rows, Tensor control, int[] columns, int[] widths, "
    "Tensor? scale, int[] scale_offsets, Tensor shift, int[] shift_offsets, Tensor residual, str program) "
    "-> (Tensor, Tensor)"
)
_ONCE: Final = [1, 1]
_PADDING: Final = ([1, 1], [0, 0], [0, 0])
_KERNELS: Final = ([3, 3], [1, 1], [1, 1])


def block(
    x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor], shifts: Sequence[Tensor], residual: Tensor
) -> tuple[Tensor, Tensor]:
    """A padded 3 by 3 convolution, a 1 by 1 of it with a residual, and a 1 by 1 of that, each with ReLU.

    Args:
        x: [B, C, H, W].
        weights: [C, C, 3, 3], [S, C, 1, 1] and [O, S, 1, 1].
        scales, shifts: one a weight, [its channels] of any float dtype; scales may be empty.
        residual: [B, S, H, W].

    Returns:
        The second result [B, S, H, W] and the third [B, O, H, W], channels-last in memory.
    """
    factors: Sequence[Tensor | None] = scales or [None] * 3
    addends = (None, residual, None)
    results = []
    for weight, scale, shift, addend, pad in zip(weights, factors, shifts, addends, _PADDING, strict=True):
        x = convolution(
            x, weight, scale, shift, addend, _ONCE, pad, _ONCE, False, [0, 0], groups=1, activation="relu"
        )
        results.append(x)
    return results[1], results[2]


def _fake(
    x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor], shifts: Sequence[Tensor], residual: Tensor
) -> tuple[Tensor, Tensor]:
    batch, _, *image = x.shape
    summed, out = (x.new_empty((batch, *image, weight.shape[0])).movedim(-1, 1) for weight in weights[1:])
    return summed, out


def _slots_cpu(
    x: Tensor,
    table: Tensor,
    rows: Tensor,
    control: Tensor,
    columns: Sequence[int],
    widths: Sequence[int],
    scale: Tensor | None,
    scale_offsets: Sequence[int],
    shift: Tensor,
    shift_offsets: Sequence[int],
    residual: Tensor,
    program: str,
) -> tuple[Tensor, Tensor]:
    """[T, B, H, W, channels] each."""
    addends, results = (None, residual, None), []
    for index, (column, n) in enumerate(zip(columns, widths, strict=True)):
        vectors = (scale, scale_offsets[index], shift, shift_offsets[index])
        steps = (_KERNELS[index], _ONCE, _PADDING[index], _ONCE, 1)
        x = SLOT_CONVOLUTION(
            x, table, rows, control, column, n, *steps, *vectors, addends[index], "relu", False, program
        )
        results.append(x)
    return results[1], results[2]


def _slots_cuda(
    x: Tensor,
    table: Tensor,
    rows: Tensor,
    control: Tensor,
    columns: Sequence[int],
    widths: Sequence[int],
    scale: Tensor | None,
    scale_offsets: Sequence[int],
    shift: Tensor,
    shift_offsets: Sequence[int],
    residual: Tensor,
    program: str,
) -> tuple[Tensor, Tensor]:
    from ..kernels.block import block as launch

    summed, out = (x.new_empty((*x.shape[:-1], width)) for width in widths[1:])
    launch(
        x,
        table,
        columns,
        rows,
        control,
        summed,
        out,
        residual=residual,
        scales=None if scale is None else [Vector(scale, offset) for offset in scale_offsets],
        shifts=[Vector(shift, offset) for offset in shift_offsets],
    )
    return summed, out


def _slots_fake(
    x: Tensor,
    table: Tensor,
    rows: Tensor,
    control: Tensor,
    columns: Sequence[int],
    widths: Sequence[int],
    *rest: object,
) -> tuple[Tensor, Tensor]:
    summed, out = (x.new_empty((*x.shape[:-1], width)) for width in widths[1:])
    return summed, out


LIBRARY.impl("block", block, "CompositeExplicitAutograd")
LIBRARY.impl("slot_block", _slots_cpu, "CPU")
LIBRARY.impl("slot_block", _slots_cuda, "CUDA")
torch.library.register_fake("mux::block", _fake, lib=LIBRARY)
torch.library.register_fake("mux::slot_block", _slots_fake, lib=LIBRARY)

BLOCK: Final = torch.ops.mux.block.default
SLOT_BLOCK: Final = torch.ops.mux.slot_block.default

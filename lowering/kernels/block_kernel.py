# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,unused-ignore"
"""The device side of a chain of three convolutions: all channels of some pixels stay in one program.

What a launch of its own would write between two of them is rounded as that launch would round it, and each
reduction runs in the order that its own kernel has, so that the bits are those of three launches.
"""

import triton
import triton.language as tl

from torch_mux.lowering.kernels.common import activate, plus, weight_pointer, working_set
from torch_mux.lowering.kernels.conv_kernel import conv_tile

__all__ = ["block_kernel"]


@triton.jit
def scaled(acc, scale, shift, column):
    """``acc * scale + shift``, the first half of an epilogue; ``scale`` may be None."""
    term = tl.load(shift + column).to(tl.float32)[None, :]
    if scale is not None:
        factor = tl.load(scale + column).to(tl.float32)[None, :]
        acc = tl.math.fma(acc, factor, term)
    else:
        acc = plus(acc, term)
    return acc


TABLES = ["table", "rows", "control"]
SIZES = ["slots", "m", "height", "width", "table_width", "column", "wide_column", "last_column",
         "scale_width", "scale_offset", "scale_wide", "scale_last",
         "shift_width", "shift_offset", "shift_wide", "shift_last"]  # fmt: skip


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TABLES)
def block_kernel(x, table, rows, control, summed, out, residual, scale, shift, slots, m, height, width,
                 table_width, column, wide_column, last_column, scale_width, scale_offset, scale_wide,
                 scale_last, shift_width, shift_offset, shift_wide, shift_last, C: tl.constexpr,
                 WIDE: tl.constexpr, LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                 BLOCK_K: tl.constexpr, SUM_STAGES: tl.constexpr,
                 PROGRAMS_PER_SM: tl.constexpr, ALIGNED: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Programs take blocks of pixels in slot order until those of the active slots are done.

    Column, scale and shift of the 3 by 3 have plain names, those of the sum end in ``wide``, those of what
    reads the sum in ``last``.
    """
    active, programs = working_set(control, slots, PROGRAMS_PER_SM, PDL)
    each = (m + BLOCK_M - 1) // BLOCK_M
    first = tl.program_id(0)
    total = tl.where(first < programs, active * each, 0)
    half = out.dtype.element_ty
    for tile in range(first, total, programs):
        slot = tile // each
        before = slot.to(tl.int64) * m
        line = tl.load(rows + slot)
        weight = weight_pointer(table, line, table_width, column, x, ALIGNED)
        wide_weight = weight_pointer(table, line, table_width, wide_column, x, ALIGNED)
        last_weight = weight_pointer(table, line, table_width, last_column, x, ALIGNED)
        factors = None if scale is None else scale + line * scale_width
        terms = shift + line * shift_width
        row = (tile - slot * each) * BLOCK_M + tl.arange(0, BLOCK_M)
        pixel = row % m  # past the end: other pixels, not one cache line for all
        channel = tl.arange(0, C)
        acc = conv_tile(x + before * C, weight, row, channel, m, C, height, width, height, width, C, C,
                        BLOCK_M, C, BLOCK_K, 3, 3, 1, 1, 1, 1, 1, 1, False, True, False, "ieee")  # fmt: skip
        acc = scaled(acc, None if factors is None else factors + scale_offset, terms + shift_offset, channel)
        middle = activate(acc, "relu").to(half)
        some = tl.arange(0, BLOCK_N)
        last = tl.arange(0, LAST)
        wide_at = wide_weight + some[None, :] * C + channel[:, None]
        last_at = last_weight + last[None, :] * WIDE + some[:, None]
        added = residual + before * WIDE + (pixel[:, None] * WIDE + some[None, :])
        stored = summed + before * WIDE + (row[:, None] * WIDE + some[None, :])
        inside = (row < m)[:, None]
        wide_factors = None if factors is None else factors + scale_wide
        acc = tl.zeros((BLOCK_M, LAST), tl.float32)
        for start in tl.range(0, WIDE, BLOCK_N, num_stages=SUM_STAGES):
            b = tl.load(wide_at + start * C)
            addend = tl.load(added + start)
            part = tl.dot(middle, b, tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
            part = scaled(part, wide_factors, terms + shift_wide, start + some)
            part = activate(plus(part, addend.to(tl.float32)), "relu").to(half)
            tl.store(stored + start, part, mask=inside)
            acc = tl.dot(part, tl.load(last_at + start), acc)
        acc = scaled(acc, None if factors is None else factors + scale_last, terms + shift_last, last)
        at = out + before * LAST + (row[:, None] * LAST + last[None, :])
        tl.store(at, activate(acc, "relu").to(half), mask=inside)

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,unused-ignore"
"""The super-kernel of depthwise convolution: one launch for every slot's own weight.

Every output channel reads one input channel, so there is nothing for a tensor core to share: a tile is output
pixels by neighbouring channels, and a thread adds up the taps of its own few.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from torch_mux.lowering.kernels import choose
from torch_mux.lowering.kernels.common import (
    Activation,
    Launch,
    check_operands,
    epilogue,
    find_slot,
    multiprocessors,
    tile_ends,
    tile_origin,
    vector_arguments,
    weight_pointer,
    working_set,
)
from torch_mux.lowering.kernels.data import Problems, Tile, Vector
from torch_mux.lowering.kernels.geometry import Pair, geometry
from torch_mux.lowering.kernels.operation import Operation

__all__ = ["depthwise", "depthwise_launch"]

FIELDS = tl.constexpr(9)  # as conv_problems writes them


@triton.jit
def depthwise_sizes(slot, problems, m, n, height, width, out_height, out_width, MULTIPLIER: tl.constexpr,
                    N_DIV: tl.constexpr, DATA_DIV: tl.constexpr, RAGGED: tl.constexpr):  # fmt: skip
    """(m, n, height, width, out height, out width, x offset, out offset) of a slot."""
    if RAGGED:
        record = problems + slot * FIELDS
        m = tl.load(record).to(tl.int32)
        n = tl.load(record + 1).to(tl.int32)
        height = tl.load(record + 2).to(tl.int32)
        width = tl.load(record + 3).to(tl.int32)
        out_height = tl.load(record + 5).to(tl.int32)
        out_width = tl.load(record + 6).to(tl.int32)
        x_offset = (tl.load(record + 7) // DATA_DIV) * DATA_DIV
        out_offset = (tl.load(record + 8) // DATA_DIV) * DATA_DIV
        n = (n // N_DIV) * N_DIV
    else:
        n = (n // N_DIV) * N_DIV
        images = m // (out_height * out_width)
        x_offset = slot.to(tl.int64) * images * height * width * (n // MULTIPLIER)
        out_offset = slot.to(tl.int64) * m * n
    return m, n, height, width, out_height, out_width, x_offset, out_offset


@triton.jit
def depthwise_tile(x, weight, row, channel, m, n, height, width, out_height, out_width, taps_down, down,
                   across, above, before, step_down, step_across, BLOCK_M: tl.constexpr,
                   BLOCK_N: tl.constexpr, KW: tl.constexpr, STEP: tl.constexpr,
                   MULTIPLIER: tl.constexpr):  # fmt: skip
    """One fp32 [BLOCK_M, BLOCK_N] tile; taps row by row, each one rounded multiply-add."""
    area = out_height * out_width
    image = row // area
    rest = row - image * area
    line = rest // out_width
    top = line * down - above
    left = (rest - line * out_width) * across - before
    base = image * height * width
    known = channel < n
    if MULTIPLIER == 1:
        channels, source = n, channel
    else:
        channels, source = n // MULTIPLIER, channel // MULTIPLIER
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tap_row in range(taps_down):
        y = top + tap_row * step_down
        there = (row < m) & (y >= 0) & (y < height)
        for first in range(0, KW, STEP):
            for number in tl.static_range(STEP):
                tap = first + number
                z = left + tap * step_across
                inside = there & (z >= 0) & (z < width)
                wanted = known
                if KW % STEP != 0:
                    inside = inside & (tap < KW)
                    wanted = wanted & (tap < KW)
                pixel = tl.where(inside, base + y * width + z, 0)
                value = tl.load(x + pixel[:, None] * channels + source[None, :],
                                mask=inside[:, None] & known[None, :], other=0.0)  # fmt: skip
                factor = tl.load(weight + (tap_row * KW + tap) * n + channel, mask=wanted, other=0.0)
                acc = tl.math.fma(value.to(tl.float32), factor.to(tl.float32)[None, :], acc)
    return acc


TABLES = ["table", "rows", "control", "problems"]
SIZES = ["slots", "m", "n", "height", "width", "out_height", "out_width", "table_width", "column",
         "scale_width", "scale_offset", "shift_width", "shift_offset", "taps_down", "down", "across", "above",
         "before", "step_down", "step_across"]  # fmt: skip


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TABLES)
def depthwise_kernel(x, table, rows, control, out, residual, problems, scale, shift, slots, m, n, height,
                     width, out_height, out_width, table_width, column, scale_width, scale_offset,
                     shift_width, shift_offset, taps_down, down, across, above, before, step_down,
                     step_across, KW: tl.constexpr, STEP: tl.constexpr, MULTIPLIER: tl.constexpr,
                     BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, SLOTS: tl.constexpr,
                     RAGGED: tl.constexpr, PROGRAMS_PER_SM: tl.constexpr, N_DIV: tl.constexpr,
                     DATA_DIV: tl.constexpr, ALIGNED: tl.constexpr, ACTIVATION: tl.constexpr,
                     PDL: tl.constexpr):  # fmt: skip
    """Programs take tiles in slot order until those of the active slots are done."""
    active, programs = working_set(control, slots, PROGRAMS_PER_SM, PDL)
    if RAGGED:
        index = tl.arange(0, SLOTS)
        sizes = problems + index * FIELDS
        ends = tile_ends(
            tl.load(sizes, mask=index < active, other=0), tl.load(sizes + 1, mask=index < active, other=0),
            BLOCK_M, BLOCK_N)  # fmt: skip
        total = tl.max(ends, 0)
    else:
        each = ((m + BLOCK_M - 1) // BLOCK_M) * ((n + BLOCK_N - 1) // BLOCK_N)
        total = active * each
    first = tl.program_id(0)
    total = tl.where(first < programs, total, 0)
    for tile in range(first, total, programs):
        if RAGGED:
            slot, local = find_slot(tile, ends)
        else:
            slot = tile // each
            local = tile - slot * each
        mm, nn, hh, ww, oh, ow, x_offset, out_offset = depthwise_sizes(
            slot, problems, m, n, height, width, out_height, out_width, MULTIPLIER, N_DIV, DATA_DIV,
            RAGGED)  # fmt: skip
        first_row, first_column = tile_origin(local, mm, nn, BLOCK_M, BLOCK_N, GROUP)
        line = tl.load(rows + slot)
        weight = weight_pointer(table, line, table_width, column, x, ALIGNED)
        row = first_row + tl.arange(0, BLOCK_M)
        channel = first_column + tl.arange(0, BLOCK_N)
        acc = depthwise_tile(x + x_offset, weight, row, channel, mm, nn, hh, ww, oh, ow, taps_down, down,
                             across, above, before, step_down, step_across, BLOCK_M, BLOCK_N, KW, STEP,
                             MULTIPLIER)  # fmt: skip
        factors = None if scale is None else scale + line * scale_width + scale_offset
        terms = None if shift is None else shift + line * shift_width + shift_offset
        addend = None if residual is None else residual + out_offset
        epilogue(acc, factors, terms, addend, out + out_offset, row, first_column, mm, nn, nn, ACTIVATION)


def _together(taps: int) -> int:
    """Taps of a row whose loads are under way at once: with more, a thread has no registers for its sums."""
    return 3 if taps % 3 == 0 else min(taps, 2)


def depthwise_launch(
    x: Tensor,
    table: Tensor,
    column: int,
    rows: Tensor,
    control: Tensor,
    out: Tensor,
    *,
    kernel: Pair,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    scale: Vector | None = None,
    shift: Vector | None = None,
    residual: Tensor | None = None,
    activation: Activation | str = Activation.NONE,
    aligned: bool = True,
    problems: Problems | None = None,
    tile: Tile | None = None,
    sms: int | None = None,
) -> Launch:
    """What :func:`depthwise` runs; same arguments and errors."""
    check_operands(x, out, residual, table, rows, control)
    named, sizes, channels = geometry(x, out, kernel, stride, padding, dilation, 1, problems)
    multipliers = {n / c for (_, n, _), c in zip(sizes, channels, strict=True)}
    multiplier = int(next(iter(multipliers), 1))
    if multipliers - {multiplier} or multiplier < 1:
        raise ValueError(f"channels out must be one whole multiple of channels in, not {sorted(multipliers)}")
    sms = multiprocessors(x.device) if sms is None else sms
    if tile is None:
        divided = min(named["N_DIV"], 16 if problems is None else named["DATA_DIV"])
        wide = aligned and multiplier == 1 and divided * x.dtype.itemsize >= 16
        tile = choose.depthwise_tile(sizes, kernel, x.dtype, sms, wide)
    del named["C"], named["C_DIV"]
    arguments = {
        "x": x, "table": table, "rows": rows, "control": control, "out": out, "residual": residual,
        "table_width": table.stride(0), "column": column,
        **named, **vector_arguments("scale", scale), **vector_arguments("shift", shift),
        "taps_down": kernel[0], "down": stride[0], "across": stride[1], "above": padding[0],
        "before": padding[1], "step_down": dilation[0], "step_across": dilation[1],
        "KW": kernel[1], "STEP": _together(kernel[1]), "MULTIPLIER": multiplier,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "GROUP": 8,
        "PROGRAMS_PER_SM": tile.programs_per_sm, "ALIGNED": aligned,
        "ACTIVATION": Activation(activation).value,
    }  # fmt: skip
    grid = min(choose.tiles_of(sizes, tile), sms * tile.programs_per_sm)
    operation = Operation(
        "depthwise", tuple(sizes), x.dtype, None, tuple(channels), kernel, None, Activation(activation).value
    )
    return Launch(depthwise_kernel, grid, arguments, tile, x.device, operation)


def depthwise(
    x: Tensor,
    table: Tensor,
    column: int,
    rows: Tensor,
    control: Tensor,
    out: Tensor,
    *,
    kernel: Pair,
    **options: Any,
) -> None:
    """``out[t] = activation(conv2d(x[t], W[t], groups=C) * scale[t] + shift[t] + residual[t])``, t active.

    Accumulates in fp32 over the taps in their order, one multiply-add each, and rounds once: bits depend on a
    slot's operands only. Slots at and behind ``control[0]`` are neither read nor written.

    Args:
        x: [T, N, H, W, C] contiguous, fp16, bf16 or fp32; with ``problems`` a flat buffer.
        table: int64 [capacity, P], addresses; slot t's weight, contiguous [KH, KW, O] in memory, is at
            ``table[rows[t], column]``.
        rows: int64 [T].
        control: int32 [2], active slots and cap in multiprocessors, read on the device.
        out: [T, N, OH, OW, O] contiguous, of x's dtype, O a multiple of C; with ``problems`` a flat buffer.
        kernel, stride, padding, dilation: (along H, along W).
        scale, shift: a :class:`Vector` [O], or None.
        residual: like out, added before the activation, or None.
        activation: an :class:`Activation` or its value.
        aligned: every address in the column is a multiple of 16 bytes.
        problems: a ragged list from :func:`geometry.conv_problems` of ungrouped shapes.
        tile, sms: instead of what :mod:`choose` and the device say.

    Raises:
        ValueError: an operand the kernel cannot read.
    """
    depthwise_launch(x, table, column, rows, control, out, kernel=kernel, **options).run()

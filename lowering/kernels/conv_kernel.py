# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,unused-ignore"
"""The device side of the convolution super-kernel: implicit GEMM, channels last.

Rows are output pixels, columns output channels, K runs over taps and channels in one flat loop. Every group
of a grouped convolution is such a problem of its own: n and channels are always those of one group.
"""

import triton
import triton.language as tl

from torch_mux.lowering.kernels.common import (
    find_slot,
    tile_ends,
    tile_origin,
    weight_pointer,
    working_set,
)
from torch_mux.lowering.kernels.linear_kernel import store

__all__ = ["conv_kernel"]

# m, channels out and in of a group: m, n, height, width, channels, out height, out width, x and out offset
FIELDS = tl.constexpr(9)


@triton.jit
def conv_sizes(slot, problems, m, n, height, width, out_height, out_width, C: tl.constexpr,
               C_DIV: tl.constexpr, N_DIV: tl.constexpr, DATA_DIV: tl.constexpr,
               GROUPS: tl.constexpr, RAGGED: tl.constexpr):  # fmt: skip
    """(m, n, height, width, out height, out width, channels, x offset, out offset) of a slot."""
    if RAGGED:
        record = problems + slot * FIELDS
        m = tl.load(record).to(tl.int32)
        n = tl.load(record + 1).to(tl.int32)
        height = tl.load(record + 2).to(tl.int32)
        width = tl.load(record + 3).to(tl.int32)
        channels = (tl.load(record + 4).to(tl.int32) // C_DIV) * C_DIV
        out_height = tl.load(record + 5).to(tl.int32)
        out_width = tl.load(record + 6).to(tl.int32)
        x_offset = (tl.load(record + 7) // DATA_DIV) * DATA_DIV
        out_offset = (tl.load(record + 8) // DATA_DIV) * DATA_DIV
        n = (n // N_DIV) * N_DIV
    else:
        channels = C
        n = (n // N_DIV) * N_DIV
        x_offset = slot.to(tl.int64) * (m // (out_height * out_width)) * height * width * (C * GROUPS)
        out_offset = slot.to(tl.int64) * m * n * GROUPS
    return m, n, height, width, out_height, out_width, channels, x_offset, out_offset


@triton.jit
def taps_inside(top, left, height, width, KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr,
                DW: tl.constexpr):  # fmt: skip
    """A bit a tap, in the order of taps, for every pixel: whether it lies inside the image; up to 31 taps."""
    lines = top * 0
    columns = left * 0
    for down in tl.static_range(KH):
        y = top + down * DH
        lines += ((y >= 0) & (y < height)).to(tl.int32) << (down * KW)
    for across in tl.static_range(KW):
        z = left + across * DW
        columns += ((z >= 0) & (z < width)).to(tl.int32) << across
    return lines * columns  # each bit of one shifted by each of the other


@triton.jit
def tap_step(x, weight_at, at, taps, top, left, index, blocks, channels, height, width, pitch,
             BLOCK_K: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
             PADDED: tl.constexpr, EVEN_K: tl.constexpr):  # fmt: skip
    """Pixels and weights of step ``index``: one block of channels of one tap.

    ``at`` is the offset of every pixel's first tap, ``taps`` what :func:`taps_inside` says. The offset from
    there is one number a step, written so that what does not change folds: of one group without dilation and
    whole blocks, only the way to the next line of taps is left besides ``index * BLOCK_K``.
    """
    tap = index // blocks
    line = index // (KW * blocks)
    start = (index - tap * blocks) * BLOCK_K
    offset = index * BLOCK_K + tap * (DW * pitch - blocks * BLOCK_K) + line * ((DH * width - KW * DW) * pitch)
    channel = tl.arange(0, BLOCK_K)
    some = start + channel < channels
    pixels = x + (at + offset)[:, None] + channel[None, :]
    if PADDED:
        if KH * KW <= 31:
            inside = ((taps >> tap) & 1) != 0
        else:
            y = top + line * DH
            z = left + (tap - line * KW) * DW
            inside = (y >= 0) & (y < height) & (z >= 0) & (z < width)
        if EVEN_K:
            a = tl.load(pixels, mask=inside[:, None], other=0.0)
        else:
            a = tl.load(pixels, mask=inside[:, None] & some[None, :], other=0.0)
    elif EVEN_K:
        a = tl.load(pixels)
    else:
        a = tl.load(pixels, mask=some[None, :], other=0.0)
    if EVEN_K:
        b = tl.load(weight_at + index * BLOCK_K)
    else:
        b = tl.load(weight_at + (tap * channels + start), mask=some[:, None], other=0.0)
    return a, b


@triton.jit
def flat_step(x, weight_at, base, top, left, index, length, channels, height, width, pitch,
              BLOCK_K: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
              PADDED: tl.constexpr, EVEN_K: tl.constexpr):  # fmt: skip
    """Pixels and weights of step ``index`` where K is flattened over taps and channels."""
    k = index * BLOCK_K + tl.arange(0, BLOCK_K)
    tap = k // channels
    down = (tap // KW) * DH
    across = (tap % KW) * DW
    pixel = base[:, None] + (down * width + across)[None, :]
    channel = (k % channels)[None, :]
    if PADDED:
        y = top[:, None] + down[None, :]
        z = left[:, None] + across[None, :]
        inside = (y >= 0) & (y < height) & (z >= 0) & (z < width)
        if not EVEN_K:
            inside = inside & (k < length)[None, :]
        a = tl.load(x + tl.where(inside, pixel, 0) * pitch + channel, mask=inside, other=0.0)
    elif EVEN_K:
        a = tl.load(x + pixel * pitch + channel)
    else:
        a = tl.load(x + pixel * pitch + channel, mask=(k < length)[None, :], other=0.0)
    if EVEN_K:
        b = tl.load(weight_at + index * BLOCK_K)
    else:
        b = tl.load(weight_at + index * BLOCK_K, mask=(k < length)[:, None], other=0.0)
    return a, b


@triton.jit
def conv_tile(x, weight, row, column, m, n, height, width, out_height, out_width, channels, pitch,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, KH: tl.constexpr,
              KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
              DH: tl.constexpr, DW: tl.constexpr, GATHER: tl.constexpr, EVEN_K: tl.constexpr,
              SWAP: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One fp32 [BLOCK_M, BLOCK_N] tile of the convolution."""
    pixel = row % m  # past the end: other pixels, not one cache line for all
    area = out_height * out_width
    image = pixel // area
    rest = pixel - image * area
    line = rest // out_width
    top = line * SH - PH
    left = (rest - line * out_width) * SW - PW
    base = (image * height + top) * width + left
    length = KH * KW * channels
    inner = tl.arange(0, BLOCK_K)
    weight_at = weight + (column % n)[None, :] * length + inner[:, None]
    blocks = (channels + BLOCK_K - 1) // BLOCK_K
    at = base * pitch
    taps = base
    if (PH > 0 or PW > 0) and (KH * KW <= 31 and not GATHER):
        taps = taps_inside(top, left, height, width, KH, KW, DH, DW)
    if GATHER:
        steps = (length + BLOCK_K - 1) // BLOCK_K
    else:
        steps = KH * KW * blocks
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for index in range(steps):
        if GATHER:
            a, b = flat_step(x, weight_at, base, top, left, index, length, channels, height, width, pitch,
                             BLOCK_K, KW, DH, DW, PH > 0 or PW > 0, EVEN_K)  # fmt: skip
        else:
            a, b = tap_step(x, weight_at, at, taps, top, left, index, blocks, channels, height, width, pitch,
                            BLOCK_K, KH, KW, DH, DW, PH > 0 or PW > 0, EVEN_K)  # fmt: skip
        if SWAP:
            acc = tl.dot(tl.trans(b), tl.trans(a), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    if SWAP:
        acc = tl.trans(acc)
    return acc


TABLES = ["table", "rows", "control", "problems"]
SIZES = ["slots", "m", "n", "height", "width", "out_height", "out_width", "table_width", "column",
         "scale_width", "scale_offset", "shift_width", "shift_offset"]  # fmt: skip


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TABLES)
def conv_kernel(x, table, rows, control, out, residual, problems, scale, shift, slots, m, n, height, width,
                out_height, out_width, table_width, column, scale_width, scale_offset, shift_width,
                shift_offset, C: tl.constexpr, GROUPS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
                SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr,
                DW: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
                SLOTS: tl.constexpr, RAGGED: tl.constexpr, PROGRAMS_PER_SM: tl.constexpr,
                GATHER: tl.constexpr, EVEN_K: tl.constexpr, C_DIV: tl.constexpr, N_DIV: tl.constexpr,
                DATA_DIV: tl.constexpr, ALIGNED: tl.constexpr, SWAP: tl.constexpr, PRECISION: tl.constexpr,
                ACTIVATION: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Programs take tiles in slot order until those of the active slots are done."""
    active, programs = working_set(control, slots, PROGRAMS_PER_SM, PDL)
    if RAGGED:
        index = tl.arange(0, SLOTS)
        sizes = problems + index * FIELDS
        ends = tile_ends(
            tl.load(sizes, mask=index < active, other=0), tl.load(sizes + 1, mask=index < active, other=0),
            BLOCK_M, BLOCK_N) * GROUPS  # fmt: skip
        total = tl.max(ends, 0)
    else:
        each = ((m + BLOCK_M - 1) // BLOCK_M) * ((n + BLOCK_N - 1) // BLOCK_N) * GROUPS
        total = active * each
    first = tl.program_id(0)
    total = tl.where(first < programs, total, 0)
    for tile in range(first, total, programs):
        if RAGGED:
            slot, local = find_slot(tile, ends)
        else:
            slot = tile // each
            local = tile - slot * each
        mm, nn, hh, ww, oh, ow, channels, x_offset, out_offset = conv_sizes(
            slot, problems, m, n, height, width, out_height, out_width, C, C_DIV, N_DIV, DATA_DIV,
            GROUPS, RAGGED)  # fmt: skip
        channels = channels if RAGGED else C
        if GROUPS > 1:
            tiles = ((mm + BLOCK_M - 1) // BLOCK_M) * ((nn + BLOCK_N - 1) // BLOCK_N)
            group = local // tiles
            local = local - group * tiles
        else:
            group = 0
        first_row, first_column = tile_origin(local, mm, nn, BLOCK_M, BLOCK_N, GROUP)
        line = tl.load(rows + slot)
        weight = weight_pointer(table, line, table_width, column, x, ALIGNED)
        row = first_row + tl.arange(0, BLOCK_M)
        channel = first_column + tl.arange(0, BLOCK_N)
        before = group * nn
        acc = conv_tile(x + x_offset + group * channels, weight + before * (KH * KW * channels), row, channel,
                        mm, nn, hh, ww, oh, ow, channels, channels * GROUPS, BLOCK_M, BLOCK_N, BLOCK_K, KH,
                        KW, SH, SW, PH, PW, DH, DW, GATHER, EVEN_K, SWAP, PRECISION)  # fmt: skip
        factors = None if scale is None else scale + line * scale_width + scale_offset + before
        terms = None if shift is None else shift + line * shift_width + shift_offset + before
        addend = None if residual is None else residual + out_offset + before
        store(acc, factors, terms, addend, out + out_offset + before, row, first_column, mm, nn, nn * GROUPS,
              ACTIVATION)  # fmt: skip

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,unused-ignore"
"""The device side of the linear super-kernel: a persistent loop over the tiles of all slots."""

import triton
import triton.language as tl

from torch_mux.lowering.kernels.common import (
    epilogue,
    find_slot,
    finish,
    tile_ends,
    tile_origin,
    weight_pointer,
    working_set,
)

__all__ = ["PART_FIELDS", "linear_kernel", "linear_tile", "part_sizes"]

FIELDS = tl.constexpr(6)  # m, n, k, x offset, out offset, weight stride
PART_FIELDS = tl.constexpr(6)  # n, first output column, weight column, weight stride, scale and shift offset


@triton.jit
def linear_sizes(slot, problems, m, n, k, stride, K_DIV: tl.constexpr, N_DIV: tl.constexpr,
                 DATA_DIV: tl.constexpr, RAGGED: tl.constexpr):  # fmt: skip
    """(m, n, k, x offset, out offset, weight stride) of a slot, with their divisors made known."""
    if RAGGED:
        record = problems + slot * FIELDS
        m = tl.load(record).to(tl.int32)
        n = tl.load(record + 1).to(tl.int32)
        k = tl.load(record + 2).to(tl.int32)
        stride = tl.load(record + 5).to(tl.int32)
    n = (n // N_DIV) * N_DIV
    k = (k // K_DIV) * K_DIV
    if RAGGED:
        x_offset = (tl.load(record + 3) // DATA_DIV) * DATA_DIV
        out_offset = (tl.load(record + 4) // DATA_DIV) * DATA_DIV
    else:
        x_offset = slot.to(tl.int64) * m * k
        out_offset = slot.to(tl.int64) * m * n
    return m, n, k, x_offset, out_offset, stride


@triton.jit
def part_sizes(parts, part, N_DIV: tl.constexpr):
    """(n, first output column, weight column, weight stride, scale offset, shift offset) of a part."""
    record = parts + part * PART_FIELDS
    n = (tl.load(record).to(tl.int32) // N_DIV) * N_DIV
    before = (tl.load(record + 1) // N_DIV) * N_DIV
    stride = tl.load(record + 3).to(tl.int32)
    return n, before, tl.load(record + 2), stride, tl.load(record + 4), tl.load(record + 5)


@triton.jit
def add_product(acc, a, weight_at, left_over, column, n, BLOCK_K: tl.constexpr, K_MAJOR: tl.constexpr,
                EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, SWAP: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    """``acc`` plus one step of pixels ``a`` by the weights at ``weight_at``; ``left_over`` of K remain."""
    inner = tl.arange(0, BLOCK_K)
    if EVEN_K and (K_MAJOR or EVEN_N):
        b = tl.load(weight_at)
    elif K_MAJOR or EVEN_N:
        b = tl.load(weight_at, mask=(inner < left_over)[:, None], other=0.0)
    else:
        b = tl.load(weight_at, mask=(inner < left_over)[:, None] & (column < n)[None, :], other=0.0)
    if SWAP:
        acc = tl.dot(tl.trans(b), tl.trans(a), acc, input_precision=PRECISION)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def weights_from(weight, column, n, stride, BLOCK_K: tl.constexpr, K_MAJOR: tl.constexpr):
    """Where the first step's weights [BLOCK_K, channels] of the channels ``column`` are."""
    inner = tl.arange(0, BLOCK_K)
    if K_MAJOR:
        return weight + (column % n)[None, :] * stride + inner[:, None]
    return weight + inner[:, None] * stride + column[None, :]


@triton.jit
def zeros(rows: tl.constexpr, columns: tl.constexpr, SWAP: tl.constexpr):
    """An fp32 accumulator of rows by columns, the other way round with ``SWAP``."""
    if SWAP:
        acc = tl.zeros((columns, rows), tl.float32)
    else:
        acc = tl.zeros((rows, columns), tl.float32)
    return acc


@triton.jit
def store(acc, scale, shift, residual, out, row, left, m, n, pitch, ACTIVATION: tl.constexpr):
    """As :func:`epilogue`, but a tile that needs nothing besides a bias goes out whole: that is faster."""
    if scale is None and residual is None:
        column = left + tl.arange(0, acc.shape[1])
        finish(acc, scale, shift, residual, out, row, column, m, n, pitch, ACTIVATION)
    else:
        epilogue(acc, scale, shift, residual, out, row, left, m, n, pitch, ACTIVATION)


@triton.jit
def linear_tile(x, weight, scale, shift, residual, out, top, left, m, n, k, stride, pitch,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SECOND_N: tl.constexpr, BLOCK_K: tl.constexpr,
                K_MAJOR: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, SWAP: tl.constexpr,
                PRECISION: tl.constexpr, ACTIVATION: tl.constexpr):  # fmt: skip
    """Computes and stores the [BLOCK_M, BLOCK_N + SECOND_N] tile at (``top``, ``left``).

    A second width, for tiles that are no power of two wide, is a second sum in the same loop: both multiply
    the rows of x that a step loads. Rows and columns past the end read others in their place, spread out: all
    reading row 0 would meet in one cache line. ``scale`` to ``out`` are those of :func:`epilogue`.
    """
    inner = tl.arange(0, BLOCK_K)
    row = top + tl.arange(0, BLOCK_M)
    column = left + tl.arange(0, BLOCK_N)
    x_at = x + (row % m)[:, None] * k + inner[None, :]
    weight_at = weights_from(weight, column, n, stride, BLOCK_K, K_MAJOR)
    step = BLOCK_K if K_MAJOR else BLOCK_K * stride
    acc = zeros(BLOCK_M, BLOCK_N, SWAP)
    if SECOND_N > 0:
        column2 = left + BLOCK_N + tl.arange(0, SECOND_N)
        weight2_at = weights_from(weight, column2, n, stride, BLOCK_K, K_MAJOR)
        acc2 = zeros(BLOCK_M, SECOND_N, SWAP)
    for start in range(0, k, BLOCK_K):
        if EVEN_K:
            a = tl.load(x_at)
        else:
            a = tl.load(x_at, mask=(inner < k - start)[None, :], other=0.0)
        acc = add_product(acc, a, weight_at, k - start, column, n, BLOCK_K, K_MAJOR, EVEN_N, EVEN_K, SWAP,
                          PRECISION)  # fmt: skip
        if SECOND_N > 0:
            acc2 = add_product(acc2, a, weight2_at, k - start, column2, n, BLOCK_K, K_MAJOR, EVEN_N, EVEN_K,
                               SWAP, PRECISION)  # fmt: skip
            weight2_at += step
        x_at += BLOCK_K
        weight_at += step
    if SWAP:
        acc = tl.trans(acc)
    store(acc, scale, shift, residual, out, row, left, m, n, pitch, ACTIVATION)
    if SECOND_N > 0:
        if SWAP:
            acc2 = tl.trans(acc2)
        store(acc2, scale, shift, residual, out, row, left + BLOCK_N, m, n, pitch, ACTIVATION)


TABLES = ["table", "rows", "control", "problems", "parts"]
SIZES = ["slots", "m", "n", "k", "stride", "width", "column", "scale_width", "scale_offset", "shift_width",
         "shift_offset"]  # fmt: skip


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TABLES)
def linear_kernel(x, table, rows, control, out, residual, problems, parts, scale, shift, slots, m, n, k,
                  stride, width, column, scale_width, scale_offset, shift_width, shift_offset,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SECOND_N: tl.constexpr,
                  BLOCK_K: tl.constexpr, GROUP: tl.constexpr, SLOTS: tl.constexpr, PARTS: tl.constexpr,
                  RAGGED: tl.constexpr, PROGRAMS_PER_SM: tl.constexpr, K_MAJOR: tl.constexpr,
                  EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, K_DIV: tl.constexpr, N_DIV: tl.constexpr,
                  DATA_DIV: tl.constexpr, STRIDE_DIV: tl.constexpr, ALIGNED: tl.constexpr, SWAP: tl.constexpr,
                  PRECISION: tl.constexpr, ACTIVATION: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Programs take tiles in slot order until those of the active slots are done."""
    WIDTH: tl.constexpr = BLOCK_N + SECOND_N
    active, programs = working_set(control, slots, PROGRAMS_PER_SM, PDL)
    if RAGGED:
        index = tl.arange(0, SLOTS)
        sizes = problems + index * FIELDS
        ends = tile_ends(
            tl.load(sizes, mask=index < active, other=0), tl.load(sizes + 1, mask=index < active, other=0),
            BLOCK_M, WIDTH)  # fmt: skip
        total = tl.max(ends, 0)
    elif PARTS > 1:
        widths = tl.load(parts + tl.arange(0, PARTS) * PART_FIELDS).to(tl.int32)
        part_ends = tile_ends(m, widths, BLOCK_M, WIDTH)
        each = tl.max(part_ends, 0)
        total = active * each
    else:
        each = ((m + BLOCK_M - 1) // BLOCK_M) * ((n + WIDTH - 1) // WIDTH)
        total = active * each
    first = tl.program_id(0)
    total = tl.where(first < programs, total, 0)
    for tile in range(first, total, programs):
        if RAGGED:
            slot, local = find_slot(tile, ends)
        else:
            slot = tile // each
            local = tile - slot * each
        mm, nn, kk, x_offset, out_offset, leading = linear_sizes(
            slot, problems, m, n, k, stride, K_DIV, N_DIV, DATA_DIV, RAGGED)  # fmt: skip
        pitch = nn
        if PARTS > 1:
            part, local = find_slot(local, part_ends)
            nn, before, weight_column, leading, scale_at, shift_at = part_sizes(parts, part, N_DIV)
            out_offset += before
        else:
            weight_column, scale_at, shift_at = column, scale_offset, shift_offset
        leading = (leading // STRIDE_DIV) * STRIDE_DIV
        top, left = tile_origin(local, mm, nn, BLOCK_M, WIDTH, GROUP)
        line = tl.load(rows + slot)
        weight = weight_pointer(table, line, width, weight_column, x, ALIGNED)
        factors = None if scale is None else scale + line * scale_width + scale_at
        terms = None if shift is None else shift + line * shift_width + shift_at
        addend = None if residual is None else residual + out_offset
        linear_tile(x + x_offset, weight, factors, terms, addend, out + out_offset, top, left, mm, nn, kk,
                    leading, pitch, BLOCK_M, BLOCK_N, SECOND_N, BLOCK_K, K_MAJOR, EVEN_N, EVEN_K, SWAP,
                    PRECISION, ACTIVATION)  # fmt: skip

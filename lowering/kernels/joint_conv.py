# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,unused-ignore"
"""One launch for convolutions of several programs: sizes and weights differ, kernel and channels do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

from torch_mux.lowering.kernels import choose
from torch_mux.lowering.kernels.common import (
    Launch,
    divisor,
    multiprocessors,
    settled,
    tile_origin,
    weight_pointer,
)
from torch_mux.lowering.kernels.conv import cut, loaded_at_once
from torch_mux.lowering.kernels.conv_kernel import conv_tile
from torch_mux.lowering.kernels.data import Tile
from torch_mux.lowering.kernels.joint import arguments_of, matching, numbered, pick, vector_of
from torch_mux.lowering.kernels.linear_kernel import store

__all__ = ["joint_conv_launch"]


@triton.jit
def conv_tiles(control, slots, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(tiles of all active slots, tiles of a slot, cap) of one member."""
    each = ((m + BLOCK_M - 1) // BLOCK_M) * ((n + BLOCK_N - 1) // BLOCK_N)
    return tl.minimum(tl.load(control), slots) * each, each, tl.load(control + 1)


@triton.jit
def joint_conv_tile(member, local, each, x, table, rows, out, residual, scale, shift, m, n, height, width,
                    out_height, out_width, table_width, column, scale_width, scale_offset, shift_width,
                    shift_offset, C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr,
                    SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
                    MEMBERS: tl.constexpr, GATHER: tl.constexpr, EVEN_K: tl.constexpr, N_DIV: tl.constexpr,
                    ALIGNED: tl.constexpr, SWAP: tl.constexpr, PRECISION: tl.constexpr,
                    ACTIVATION: tl.constexpr):  # fmt: skip
    """Computes and stores tile ``local`` of a member; the others have one value a member each."""
    tiles = pick(member, each, MEMBERS)
    slot = local // tiles
    mm = pick(member, m, MEMBERS)
    nn = (pick(member, n, MEMBERS) // N_DIV) * N_DIV
    hh = pick(member, height, MEMBERS)
    ww = pick(member, width, MEMBERS)
    oh = pick(member, out_height, MEMBERS)
    ow = pick(member, out_width, MEMBERS)
    top, left = tile_origin(local - slot * tiles, mm, nn, BLOCK_M, BLOCK_N, GROUP)
    line = tl.load(pick(member, rows, MEMBERS) + slot)
    pixels = pick(member, x, MEMBERS)
    pitch, place = pick(member, table_width, MEMBERS), pick(member, column, MEMBERS)
    weight = weight_pointer(pick(member, table, MEMBERS), line, pitch, place, pixels, ALIGNED)
    row = top + tl.arange(0, BLOCK_M)
    channel = left + tl.arange(0, BLOCK_N)
    pixels += slot.to(tl.int64) * (mm // (oh * ow)) * hh * ww * C
    acc = conv_tile(pixels, weight, row, channel, mm, nn, hh, ww, oh, ow, C, C, BLOCK_M, BLOCK_N, BLOCK_K, KH,
                    KW, SH, SW, PH, PW, DH, DW, GATHER, EVEN_K, SWAP, PRECISION)  # fmt: skip
    scale_at, shift_at = pick(member, scale_offset, MEMBERS), pick(member, shift_offset, MEMBERS)
    factors = None if scale[0] is None else vector_of(member, scale, scale_width, line, scale_at, MEMBERS)
    terms = None if shift[0] is None else vector_of(member, shift, shift_width, line, shift_at, MEMBERS)
    start = slot.to(tl.int64) * mm * nn
    addend = None if residual[0] is None else pick(member, residual, MEMBERS) + start
    store(acc, factors, terms, addend, pick(member, out, MEMBERS) + start, row, left, mm, nn, nn,
          ACTIVATION)  # fmt: skip


POINTERS = ["x", "table", "rows", "control", "out", "residual", "scale", "shift"]
NUMBERS = ["slots", "m", "n", "height", "width", "out_height", "out_width", "table_width", "column",
           "scale_width", "scale_offset", "shift_width", "shift_offset"]  # fmt: skip
_TABLES = ["table", "rows", "control"]
_SHARED = ("C", "KH", "KW", "SH", "SW", "PH", "PW", "DH", "DW", "ALIGNED", "SWAP", "PRECISION", "ACTIVATION")


@triton.jit(do_not_specialize=numbered(NUMBERS), do_not_specialize_on_alignment=numbered(_TABLES))
def joint_conv_kernel(
    x0, x1, x2, x3, table0, table1, table2, table3, rows0, rows1, rows2, rows3, control0, control1, control2,
    control3, out0, out1, out2, out3, residual0, residual1, residual2, residual3, scale0, scale1, scale2,
    scale3, shift0, shift1, shift2, shift3, slots0, slots1, slots2, slots3, m0, m1, m2, m3, n0, n1, n2, n3,
    height0, height1, height2, height3, width0, width1, width2, width3, out_height0, out_height1, out_height2,
    out_height3, out_width0, out_width1, out_width2, out_width3, table_width0, table_width1, table_width2,
    table_width3, column0, column1, column2, column3, scale_width0, scale_width1, scale_width2, scale_width3,
    scale_offset0, scale_offset1, scale_offset2, scale_offset3, shift_width0, shift_width1, shift_width2,
    shift_width3, shift_offset0, shift_offset1, shift_offset2, shift_offset3, C: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr,
    PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr, MEMBERS: tl.constexpr, PROGRAMS_PER_SM: tl.constexpr,
    GATHER: tl.constexpr, EVEN_K: tl.constexpr, N_DIV: tl.constexpr, ALIGNED: tl.constexpr,
    SWAP: tl.constexpr, PRECISION: tl.constexpr, ACTIVATION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs take tiles in the order of members and slots until those of all active slots are done."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    all0, each0, cap0 = conv_tiles(control0, slots0, m0, n0, BLOCK_M, BLOCK_N)
    all1, each1, cap1 = conv_tiles(control1, slots1, m1, n1, BLOCK_M, BLOCK_N)
    all2, each2, cap2 = 0, each1, cap1
    if MEMBERS > 2:
        all2, each2, cap2 = conv_tiles(control2, slots2, m2, n2, BLOCK_M, BLOCK_N)
    all3, each3, cap3 = 0, each1, cap1
    if MEMBERS > 3:
        all3, each3, cap3 = conv_tiles(control3, slots3, m3, n3, BLOCK_M, BLOCK_N)
    first1, first2, first3 = all0, all0 + all1, all0 + all1 + all2
    cap = tl.maximum(tl.minimum(tl.minimum(cap0, cap1), tl.minimum(cap2, cap3)), 1)
    programs = tl.minimum(cap * PROGRAMS_PER_SM, tl.num_programs(0))
    first = tl.program_id(0)
    total = tl.where(first < programs, first3 + all3, 0)
    for tile in range(first, total, programs):
        member = (tile >= first1).to(tl.int32) + (tile >= first2).to(tl.int32) + (tile >= first3).to(tl.int32)
        member = tl.minimum(member, MEMBERS - 1)
        local = tile - pick(member, (0, first1, first2, first3), MEMBERS)
        joint_conv_tile(
            member, local, (each0, each1, each2, each3), (x0, x1, x2, x3), (table0, table1, table2, table3),
            (rows0, rows1, rows2, rows3), (out0, out1, out2, out3),
            (residual0, residual1, residual2, residual3), (scale0, scale1, scale2, scale3),
            (shift0, shift1, shift2, shift3), (m0, m1, m2, m3), (n0, n1, n2, n3),
            (height0, height1, height2, height3), (width0, width1, width2, width3),
            (out_height0, out_height1, out_height2, out_height3),
            (out_width0, out_width1, out_width2, out_width3),
            (table_width0, table_width1, table_width2, table_width3), (column0, column1, column2, column3),
            (scale_width0, scale_width1, scale_width2, scale_width3),
            (scale_offset0, scale_offset1, scale_offset2, scale_offset3),
            (shift_width0, shift_width1, shift_width2, shift_width3),
            (shift_offset0, shift_offset1, shift_offset2, shift_offset3), C, KH, KW, SH, SW, PH, PW, DH, DW,
            BLOCK_M, BLOCK_N, BLOCK_K, GROUP, MEMBERS, GATHER, EVEN_K, N_DIV, ALIGNED, SWAP, PRECISION,
            ACTIVATION)  # fmt: skip


def joint_conv_launch(launches: Sequence[Launch], tile: Tile | None = None, sms: int | None = None) -> Launch:
    """One launch that does what all of ``launches`` would do, with the bits of each.

    Args:
        launches: two to ``MOST_MEMBERS`` convolutions whose operations match.
        tile, sms: instead of what :mod:`choose` and the device say.

    Raises:
        ValueError: operations that do not match, too few or too many of them, or a tile outside their class.
    """
    launches, operation, bit_class = matching(launches)
    sizes, device = operation.sizes, launches[0].device
    sms = multiprocessors(device) if sms is None else sms
    named = launches[0].arguments
    if tile is None:
        wide = named["ALIGNED"] and loaded_at_once(named, bit_class) * operation.dtype.itemsize >= 16
        tile = choose.conv_tile(
            sizes, operation.channels, operation.dtype, bit_class, sms, wide=wide, settled=settled(device)
        )
    choose.check(tile, bit_class)
    taps = named["KH"] * named["KW"]
    reduction = [taps * c for c in operation.channels] if bit_class.gather else operation.channels
    arguments: dict[str, Any] = {
        **{name: named[name] for name in _SHARED},
        **cut(tile, bit_class, reduction),
        "MEMBERS": len(launches),
        "N_DIV": divisor(*(launch.arguments["N_DIV"] for launch in launches)),
        **arguments_of([launch.arguments for launch in launches], POINTERS, NUMBERS),
    }
    grid = min(choose.tiles_of(sizes, tile), sms * tile.programs_per_sm)
    return Launch(
        joint_conv_kernel, grid, arguments, tile, device, operation, plain=True, registers=tile.registers
    )

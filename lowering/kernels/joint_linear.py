# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,unused-ignore"
"""One launch for linear layers of several programs: what each would launch, over one list of tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

from torch_mux.lowering.kernels import choose
from torch_mux.lowering.kernels.common import (
    Launch,
    divisor,
    find_slot,
    multiprocessors,
    settled,
    tile_ends,
    tile_origin,
    weight_pointer,
)
from torch_mux.lowering.kernels.data import Part, Tile
from torch_mux.lowering.kernels.joint import Sizes, arguments_of, matching, numbered, pick, vector_of
from torch_mux.lowering.kernels.linear import part_records
from torch_mux.lowering.kernels.linear_kernel import PART_FIELDS, linear_tile, part_sizes

__all__ = ["joint_linear_launch"]


@triton.jit
def member_tiles(control, slots, parts, m, n, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr,
                 PARTS: tl.constexpr):  # fmt: skip
    """(tiles of all active slots, tiles of a slot, first tile behind each part, cap) of one member."""
    active = tl.minimum(tl.load(control), slots)
    if PARTS > 1:
        widths = tl.load(parts + tl.arange(0, PARTS) * PART_FIELDS).to(tl.int32)
        ends = tile_ends(m, widths, BLOCK_M, WIDTH)
        each = tl.max(ends, 0)
    else:
        each = ((m + BLOCK_M - 1) // BLOCK_M) * ((n + WIDTH - 1) // WIDTH)
        ends = each
    return active * each, each, ends, tl.load(control + 1)


@triton.jit
def piece_of(member, local, ends, parts, n, columns, strides, scale_offsets, shift_offsets,
             MEMBERS: tl.constexpr, PARTS: tl.constexpr, N_DIV: tl.constexpr):  # fmt: skip
    """(tile within it, n, first output column, weight column and stride, scale and shift offset) of a weight.

    A member's only weight, or the part that tile ``local`` of a slot belongs to.
    """
    if PARTS > 1:
        part, local = find_slot(local, pick(member, ends, MEMBERS))
        n, before, column, stride, scale_at, shift_at = part_sizes(pick(member, parts, MEMBERS), part, N_DIV)
    else:
        before = 0
        column = pick(member, columns, MEMBERS)
        stride = pick(member, strides, MEMBERS)
        scale_at = pick(member, scale_offsets, MEMBERS)
        shift_at = pick(member, shift_offsets, MEMBERS)
    return local, n, before, column, stride, scale_at, shift_at


@triton.jit
def joint_tile(member, local, each, ends, x, table, rows, out, residual, parts, scale, shift, m, n, k, stride,
               width, column, scale_width, scale_offset, shift_width, shift_offset, BLOCK_M: tl.constexpr,
               BLOCK_N: tl.constexpr, SECOND_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
               MEMBERS: tl.constexpr, PARTS: tl.constexpr, K_MAJOR: tl.constexpr, EVEN_N: tl.constexpr,
               EVEN_K: tl.constexpr, K_DIV: tl.constexpr, N_DIV: tl.constexpr, STRIDE_DIV: tl.constexpr,
               ALIGNED: tl.constexpr, SWAP: tl.constexpr, PRECISION: tl.constexpr,
               ACTIVATION: tl.constexpr):  # fmt: skip
    """Computes and stores tile ``local`` of a member; the others have one value a member each."""
    tiles = pick(member, each, MEMBERS)
    slot = local // tiles
    mm = pick(member, m, MEMBERS)
    whole = (pick(member, n, MEMBERS) // N_DIV) * N_DIV
    kk = (pick(member, k, MEMBERS) // K_DIV) * K_DIV
    local, nn, before, weight_column, leading, scale_at, shift_at = piece_of(
        member, local - slot * tiles, ends, parts, whole, column, stride, scale_offset, shift_offset, MEMBERS,
        PARTS, N_DIV)  # fmt: skip
    leading = (leading // STRIDE_DIV) * STRIDE_DIV
    top, left = tile_origin(local, mm, nn, BLOCK_M, BLOCK_N + SECOND_N, GROUP)
    line = tl.load(pick(member, rows, MEMBERS) + slot)
    pixels = pick(member, x, MEMBERS)
    pitch = pick(member, width, MEMBERS)
    weight = weight_pointer(pick(member, table, MEMBERS), line, pitch, weight_column, pixels, ALIGNED)
    pixels += slot.to(tl.int64) * mm * kk
    factors = None if scale[0] is None else vector_of(member, scale, scale_width, line, scale_at, MEMBERS)
    terms = None if shift[0] is None else vector_of(member, shift, shift_width, line, shift_at, MEMBERS)
    place = slot.to(tl.int64) * mm * whole + before
    addend = None if residual[0] is None else pick(member, residual, MEMBERS) + place
    result = pick(member, out, MEMBERS) + place
    linear_tile(pixels, weight, factors, terms, addend, result, top, left, mm, nn, kk, leading, whole,
                BLOCK_M, BLOCK_N, SECOND_N, BLOCK_K, K_MAJOR, EVEN_N, EVEN_K, SWAP, PRECISION,
                ACTIVATION)  # fmt: skip


MEMBER = ["x", "table", "rows", "control", "out", "residual", "parts", "scale", "shift"]
SIZES = ["slots", "m", "n", "k", "stride", "width", "column", "scale_width", "scale_offset", "shift_width",
         "shift_offset"]  # fmt: skip
_TABLES = ["table", "rows", "control", "parts"]


@triton.jit(do_not_specialize=numbered(SIZES), do_not_specialize_on_alignment=numbered(_TABLES))
def joint_linear_kernel(
    x0, x1, x2, x3, table0, table1, table2, table3, rows0, rows1, rows2, rows3, control0, control1, control2,
    control3, out0, out1, out2, out3, residual0, residual1, residual2, residual3, parts0, parts1, parts2,
    parts3, scale0, scale1, scale2, scale3, shift0, shift1, shift2, shift3, slots0, slots1, slots2, slots3,
    m0, m1, m2, m3, n0, n1, n2, n3, k0, k1, k2, k3, stride0, stride1, stride2, stride3,
    width0, width1, width2, width3, column0, column1, column2, column3, scale_width0, scale_width1,
    scale_width2, scale_width3, scale_offset0, scale_offset1, scale_offset2, scale_offset3, shift_width0,
    shift_width1, shift_width2, shift_width3, shift_offset0, shift_offset1, shift_offset2, shift_offset3,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SECOND_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, MEMBERS: tl.constexpr, PARTS: tl.constexpr, PROGRAMS_PER_SM: tl.constexpr,
    K_MAJOR: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, K_DIV: tl.constexpr,
    N_DIV: tl.constexpr, STRIDE_DIV: tl.constexpr, ALIGNED: tl.constexpr, SWAP: tl.constexpr,
    PRECISION: tl.constexpr, ACTIVATION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs take tiles in the order of members and slots until those of all active slots are done."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    WIDTH: tl.constexpr = BLOCK_N + SECOND_N
    all0, each0, ends0, cap0 = member_tiles(control0, slots0, parts0, m0, n0, BLOCK_M, WIDTH, PARTS)
    all1, each1, ends1, cap1 = member_tiles(control1, slots1, parts1, m1, n1, BLOCK_M, WIDTH, PARTS)
    all2, each2, ends2, cap2 = 0, each1, ends1, cap1
    if MEMBERS > 2:
        all2, each2, ends2, cap2 = member_tiles(control2, slots2, parts2, m2, n2, BLOCK_M, WIDTH, PARTS)
    all3, each3, ends3, cap3 = 0, each1, ends1, cap1
    if MEMBERS > 3:
        all3, each3, ends3, cap3 = member_tiles(control3, slots3, parts3, m3, n3, BLOCK_M, WIDTH, PARTS)
    first1, first2, first3 = all0, all0 + all1, all0 + all1 + all2
    cap = tl.maximum(tl.minimum(tl.minimum(cap0, cap1), tl.minimum(cap2, cap3)), 1)
    programs = tl.minimum(cap * PROGRAMS_PER_SM, tl.num_programs(0))
    first = tl.program_id(0)
    total = tl.where(first < programs, first3 + all3, 0)
    for tile in range(first, total, programs):
        member = (tile >= first1).to(tl.int32) + (tile >= first2).to(tl.int32) + (tile >= first3).to(tl.int32)
        member = tl.minimum(member, MEMBERS - 1)
        local = tile - pick(member, (0, first1, first2, first3), MEMBERS)
        joint_tile(
            member, local, (each0, each1, each2, each3), (ends0, ends1, ends2, ends3), (x0, x1, x2, x3),
            (table0, table1, table2, table3), (rows0, rows1, rows2, rows3), (out0, out1, out2, out3),
            (residual0, residual1, residual2, residual3), (parts0, parts1, parts2, parts3),
            (scale0, scale1, scale2, scale3), (shift0, shift1, shift2, shift3), (m0, m1, m2, m3),
            (n0, n1, n2, n3), (k0, k1, k2, k3), (stride0, stride1, stride2, stride3),
            (width0, width1, width2, width3), (column0, column1, column2, column3),
            (scale_width0, scale_width1, scale_width2, scale_width3),
            (scale_offset0, scale_offset1, scale_offset2, scale_offset3),
            (shift_width0, shift_width1, shift_width2, shift_width3),
            (shift_offset0, shift_offset1, shift_offset2, shift_offset3), BLOCK_M, BLOCK_N, SECOND_N,
            BLOCK_K, GROUP, MEMBERS, PARTS, K_MAJOR, EVEN_N, EVEN_K, K_DIV, N_DIV, STRIDE_DIV, ALIGNED,
            SWAP, PRECISION, ACTIVATION)  # fmt: skip


def _parts(launch: Launch) -> Any:
    """The list of parts of a member, made for a single weight as well."""
    named = launch.arguments
    if named["parts"] is not None:
        return named["parts"]
    part = Part(named["column"], named["n"], named["stride"], named["scale_offset"], named["shift_offset"])
    return part_records((part,), named["x"])


def _common(launches: Sequence[Launch], sizes: Sizes, tile: Tile, swap: bool) -> dict[str, Any]:
    """What the kernel is compiled for: what holds for all members."""
    first = launches[0].arguments
    named = {key: first[key] for key in ("K_MAJOR", "ALIGNED", "PRECISION", "ACTIVATION")}
    for key in ("K_DIV", "N_DIV", "STRIDE_DIV"):
        named[key] = divisor(*(launch.arguments[key] for launch in launches))
    return {
        **named, "MEMBERS": len(launches), "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
        "SECOND_N": tile.second_n, "BLOCK_K": tile.block_k, "GROUP": 8,
        "PROGRAMS_PER_SM": tile.programs_per_sm, "SWAP": swap,
        "EVEN_N": all(n % tile.width == 0 for _, n, _ in sizes),
        "EVEN_K": all(k % tile.block_k == 0 for _, _, k in sizes),
    }  # fmt: skip


def joint_linear_launch(
    launches: Sequence[Launch], tile: Tile | None = None, sms: int | None = None
) -> Launch:
    """One launch that does what all of ``launches`` would do, with the bits of each.

    Members whose reduction is long come first, so that the last tiles are short ones. It is no dependent
    launch, since its members' inputs come from several streams.

    Args:
        launches: two to ``MOST_MEMBERS`` linear layers whose operations match.
        tile, sms: instead of what :mod:`choose` and the device say.

    Raises:
        ValueError: operations that do not match, too few or too many of them, or a tile outside their class.
    """
    launches, operation, bit_class = matching(launches)
    sizes, device = operation.sizes, launches[0].device
    sms = multiprocessors(device) if sms is None else sms
    if tile is None:
        named = [launch.arguments for launch in launches]
        divided = min(min(each["K_DIV"], each["STRIDE_DIV"]) for each in named)
        wide = named[0]["ALIGNED"] and divided * operation.dtype.itemsize >= 16
        lean = named[0]["K_MAJOR"]
        tile = choose.tile(
            sizes, operation.dtype, bit_class, sms, lean=lean, wide=wide, settled=settled(device)
        )
    choose.check(tile, bit_class)
    count = max(launch.arguments["PARTS"] for launch in launches)
    members = [{**launch.arguments, "parts": _parts(launch) if count > 1 else None} for launch in launches]
    common = _common(launches, sizes, tile, tile.swap or bit_class.swap)
    arguments = {"PARTS": count, **common, **arguments_of(members, MEMBER, SIZES)}
    grid = min(choose.tiles_of(sizes, tile), sms * tile.programs_per_sm)
    return Launch(
        joint_linear_kernel, grid, arguments, tile, device, operation, plain=True, registers=tile.registers
    )

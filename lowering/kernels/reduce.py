# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,unused-ignore"
"""Adds up the parts of a split reduction, in order, and applies the epilogue.

Stream-K's fix-up (Osama et al., "Stream-K: Work-centric Parallel Decomposition for Dense Matrix-Matrix
Multiplication on the GPU", 2023) lets whoever comes last add up; here it is a launch of its own, so that no
counters have to be cleared and the order is always the same.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_mux.lowering.kernels.common import Launch, find_slot, finish, tile_ends, working_set
from torch_mux.lowering.kernels.data import Tile

__all__ = ["parts_of", "reduce_kernel", "reduce_launch"]

_TILE = Tile(16, 64, 16, 4, 1, 8)
SIZES = ["slots", "m", "n", "span", "scale_width", "scale_offset", "shift_width", "shift_offset"]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["rows", "control", "problems"])
def reduce_kernel(parts, rows, control, out, residual, problems, scale, shift, slots, m, n, span,
                  scale_width, scale_offset, shift_width, shift_offset, BLOCK_M: tl.constexpr,
                  BLOCK_N: tl.constexpr, SLOTS: tl.constexpr, FIELDS: tl.constexpr, OUT_FIELD: tl.constexpr,
                  RAGGED: tl.constexpr, GROUPS: tl.constexpr, PROGRAMS_PER_SM: tl.constexpr,
                  N_DIV: tl.constexpr, DATA_DIV: tl.constexpr, SPLIT: tl.constexpr, ACTIVATION: tl.constexpr,
                  PDL: tl.constexpr):  # fmt: skip
    """``activation(sum of parts[:, t] * scale[t] + shift[t] + residual[t])``, parts ``span`` apart."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    active, programs = working_set(control, slots, PROGRAMS_PER_SM)
    if RAGGED:
        index = tl.arange(0, SLOTS)
        sizes = problems + index * FIELDS
        ends = tile_ends(
            tl.load(sizes, mask=index < active, other=0),
            tl.load(sizes + 1, mask=index < active, other=0) * GROUPS, BLOCK_M, BLOCK_N)  # fmt: skip
        total = tl.max(ends, 0)
    else:
        each = ((m + BLOCK_M - 1) // BLOCK_M) * ((n + BLOCK_N - 1) // BLOCK_N)
        total = active * each
    first = tl.program_id(0)
    total = tl.where(first < programs, total, 0)
    for tile in range(first, total, programs):
        if RAGGED:
            slot, local = find_slot(tile, ends)
            record = problems + slot * FIELDS
            mm = tl.load(record).to(tl.int32)
            nn = (tl.load(record + 1).to(tl.int32) // N_DIV) * N_DIV * GROUPS
            offset = (tl.load(record + OUT_FIELD) // DATA_DIV) * DATA_DIV
        else:
            slot = tile // each
            local = tile - slot * each
            mm = m
            nn = (n // N_DIV) * N_DIV
            offset = slot.to(tl.int64) * mm * nn
        across = (nn + BLOCK_N - 1) // BLOCK_N
        line = tl.load(rows + slot)
        row = (local // across) * BLOCK_M + tl.arange(0, BLOCK_M)
        column = (local % across) * BLOCK_N + tl.arange(0, BLOCK_N)
        at = parts + offset + row[:, None] * nn + column[None, :]
        mask = (row < mm)[:, None] & (column < nn)[None, :]
        acc = tl.load(at, mask=mask, other=0.0)
        for part in tl.static_range(1, SPLIT):
            acc += tl.load(at + part * span.to(tl.int64), mask=mask, other=0.0)
        factors = None if scale is None else scale + line * scale_width + scale_offset
        terms = None if shift is None else shift + line * shift_width + shift_offset
        addend = None if residual is None else residual + offset
        finish(acc, factors, terms, addend, out + offset, row, column, mm, nn, nn, ACTIVATION)


def reduce_launch(
    parts: Tensor,
    rows: Tensor,
    control: Tensor,
    out: Tensor,
    *,
    split: int,
    sizes: Sequence[tuple[int, int, int]],
    sms: int,
    fields: tuple[int, int],
    arguments: Mapping[str, Any],
    pdl: bool = False,
) -> Launch:
    """The launch that makes ``out`` of the parts of a super-kernel.

    Args:
        parts: fp32, ``split`` times the elements of ``out``.
        rows, control, out: those of the super-kernel.
        sizes: (m, all output channels, anything) of every slot.
        sms: multiprocessors.
        fields: of a record of a ragged list, how many there are and which holds the place in ``out``.
        arguments: of the super-kernel: ``residual``, the vectors, ``ACTIVATION`` and how its slots are cut.
    """
    own = ("residual", "problems", "scale", "shift", "slots", "scale_width", "scale_offset", "shift_width",
           "shift_offset", "SLOTS", "RAGGED", "GROUPS", "N_DIV", "DATA_DIV", "ACTIVATION")  # fmt: skip
    tile, device = _TILE, out.device
    tiles = sum(-(-m // tile.block_m) * -(-n // tile.block_n) for m, n, _ in sizes)
    return Launch(
        reduce_kernel,
        min(tiles, sms * tile.programs_per_sm),
        {
            "parts": parts, "rows": rows, "control": control, "out": out, "m": sizes[0][0], "n": sizes[0][1],
            "span": out.numel(), "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "FIELDS": fields[0],
            "OUT_FIELD": fields[1], "PROGRAMS_PER_SM": tile.programs_per_sm, "SPLIT": split, "PDL": pdl,
            **{name: arguments[name] for name in own},
        },
        tile,
        device,
        pdl,
    )  # fmt: skip


def parts_of(out: Tensor, split: int) -> Tensor:
    """Where the parts go."""
    return torch.empty(split * out.numel(), dtype=torch.float32, device=out.device)

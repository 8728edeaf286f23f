# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,unused-ignore"
"""The super-kernel of ``embedding``: rows gathered from every slot's own table of vectors."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_mux.lowering.kernels.common import Launch, divisor, multiprocessors, weight_pointer, working_set
from torch_mux.lowering.kernels.data import Tile
from torch_mux.lowering.kernels.operation import Operation

__all__ = ["embedding", "embedding_launch"]

TABLES = ["indices", "table", "rows", "control"]
SIZES = ["slots", "count", "depth", "width", "column", "entries"]
PROGRAMS = 8


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TABLES)
def embedding_kernel(indices, table, rows, control, out, slots, count, depth, width, column, entries,
                     BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, PROGRAMS_PER_SM: tl.constexpr,
                     D_DIV: tl.constexpr, ALIGNED: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Copies [BLOCK_L, BLOCK_D] of the output a step; an index outside the table gives NaN."""
    active, programs = working_set(control, slots, PROGRAMS_PER_SM, PDL)
    depth = (depth // D_DIV) * D_DIV
    across = (depth + BLOCK_D - 1) // BLOCK_D
    each = ((count + BLOCK_L - 1) // BLOCK_L) * across
    first = tl.program_id(0)
    total = tl.where(first < programs, active * each, 0)
    for tile in range(first, total, programs):
        slot = tile // each
        local = tile - slot * each
        weight = weight_pointer(table, tl.load(rows + slot), width, column, out, ALIGNED)
        position = (local // across) * BLOCK_L + tl.arange(0, BLOCK_L)
        channel = (local % across) * BLOCK_D + tl.arange(0, BLOCK_D)
        here = position < count
        index = tl.load(indices + slot.to(tl.int64) * count + position, mask=here, other=0).to(tl.int64)
        known = (index >= 0) & (index < entries)
        mask = here[:, None] & (channel < depth)[None, :]
        at = weight + tl.where(known, index, 0)[:, None] * depth + channel[None, :]
        value = tl.load(at, mask=mask & known[:, None], other=float("nan"))
        target = slot.to(tl.int64) * count * depth + position[:, None] * depth + channel[None, :]
        tl.store(out + target, value, mask=mask)


def embedding_launch(
    indices: Tensor,
    table: Tensor,
    column: int,
    rows: Tensor,
    control: Tensor,
    out: Tensor,
    num_embeddings: int,
    *,
    aligned: bool = True,
    sms: int | None = None,
) -> Launch:
    """What :func:`embedding` runs; same arguments and errors."""
    depth = out.shape[-1]
    if indices.dtype not in (torch.int64, torch.int32) or not indices.is_contiguous():
        raise ValueError(f"indices must be contiguous int64 or int32, not {indices.dtype}")
    if not out.dtype.is_floating_point or not out.is_contiguous() or out.shape != (*indices.shape, depth):
        raise ValueError(f"out must be contiguous, floating point and {(*indices.shape, depth)}")
    slots = indices.shape[0]
    count = indices.numel() // max(1, slots)
    block_d = min(1024, triton.next_power_of_2(max(depth, 1)))
    block_l = max(1, 1024 // block_d)
    tile = Tile(block_l, block_d, 16, 4, 1, PROGRAMS)
    sms = multiprocessors(out.device) if sms is None else sms
    tiles = slots * -(-count // block_l) * -(-depth // block_d)
    arguments = {
        "indices": indices, "table": table, "rows": rows, "control": control, "out": out, "slots": slots,
        "count": count, "depth": depth, "width": table.stride(0), "column": column, "entries": num_embeddings,
        "BLOCK_L": block_l, "BLOCK_D": block_d, "PROGRAMS_PER_SM": PROGRAMS,
        "D_DIV": divisor(depth), "ALIGNED": aligned,
    }  # fmt: skip
    operation = Operation("embedding", ((count, depth, 1),) * slots, out.dtype)
    return Launch(embedding_kernel, min(tiles, sms * PROGRAMS), arguments, tile, out.device, operation)


def embedding(
    indices: Tensor,
    table: Tensor,
    column: int,
    rows: Tensor,
    control: Tensor,
    out: Tensor,
    num_embeddings: int,
    *,
    aligned: bool = True,
    sms: int | None = None,
) -> None:
    """``out[t, ...] = W[t][indices[t, ...]]`` for every active slot t.

    Slots at and behind ``control[0]`` are neither read nor written.

    Args:
        indices: [T, *L] contiguous, int64 or int32. An index outside [0, num_embeddings) gives a row of NaN:
            it must not read a neighbour's memory, and a captured graph cannot raise.
        table: int64 [capacity, P], addresses; slot t's weight, contiguous [num_embeddings, D], is at
            ``table[rows[t], column]``.
        rows: int64 [T].
        control: int32 [2], active slots and cap in multiprocessors, read on the device.
        out: [T, *L, D] contiguous, of the weight's dtype.
        aligned: every address in the column is a multiple of 16 bytes.
        sms: multiprocessors, instead of the device's.

    Raises:
        ValueError: an operand the kernel cannot read.
    """
    embedding_launch(
        indices, table, column, rows, control, out, num_embeddings, aligned=aligned, sms=sms
    ).run()

"""The super-kernel of a chain of three convolutions: one launch for every slot's own weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from torch_mux.lowering.kernels import choose_block
from torch_mux.lowering.kernels.block_kernel import block_kernel
from torch_mux.lowering.kernels.choose_block import BlockSize, BlockTile
from torch_mux.lowering.kernels.common import Launch, check_operands, multiprocessors
from torch_mux.lowering.kernels.data import BitClass, Vector
from torch_mux.lowering.kernels.operation import Operation

__all__ = ["block", "block_launch"]

Vectors = Sequence[Vector]
_NAMES = ("offset", "wide", "last")


def _arena(name: str, vectors: Vectors | None) -> dict[str, Any]:
    """The kernel arguments of three vectors of one arena."""
    if vectors is None:
        return {name: None, f"{name}_width": 0, **{f"{name}_{part}": 0 for part in _NAMES}}
    arena = vectors[0].arena
    if len(vectors) != 3 or any(vector.arena is not arena for vector in vectors) or arena.stride(1) != 1:
        raise ValueError(f"{name} must be three vectors of one arena whose rows are contiguous")
    offsets = {f"{name}_{part}": vector.offset for part, vector in zip(_NAMES, vectors, strict=True)}
    return {name: arena, f"{name}_width": arena.stride(0), **offsets}


def block_launch(
    x: Tensor,
    table: Tensor,
    columns: Sequence[int],
    rows: Tensor,
    control: Tensor,
    summed: Tensor,
    out: Tensor,
    *,
    residual: Tensor,
    scales: Vectors | None,
    shifts: Vectors,
    aligned: bool = True,
    tile: BlockTile | None = None,
    sms: int | None = None,
) -> Launch:
    """What :func:`block` runs; same arguments and errors."""
    check_operands(x, out, None, table, rows, control)
    check_operands(x, summed, residual, table, rows, control)
    slots, images, height, width, channels = x.shape
    size = BlockSize(images * height * width, channels, summed.shape[-1], out.shape[-1])
    if x.shape[:-1] != out.shape[:-1] or x.shape[:-1] != summed.shape[:-1]:
        raise ValueError(f"x, the sum and out must have the same pixels, not {x.shape}, {out.shape}")
    if tile is None:
        if not choose_block.owned(size, x.dtype):
            raise ValueError(f"{size} of {x.dtype} is no chain that one launch is for")
        tile = choose_block.tile(size)
    if size.wide % tile.block_n or channels % tile.block_k:
        raise ValueError(f"{tile} does not divide {size}")
    sms = multiprocessors(x.device) if sms is None else sms
    first, wide, last = columns
    arguments = {
        "x": x, "table": table, "rows": rows, "control": control, "summed": summed, "out": out,
        "residual": residual, "slots": slots, "m": size.pixels, "height": height, "width": width,
        "table_width": table.stride(0), "column": first, "wide_column": wide, "last_column": last,
        **_arena("scale", scales), **_arena("shift", shifts), "C": channels, "WIDE": size.wide,
        "LAST": size.last, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        "SUM_STAGES": tile.sum_stages, "PROGRAMS_PER_SM": tile.programs_per_sm,
        "ALIGNED": aligned,
    }  # fmt: skip
    sizes = ((size.pixels, size.wide, size.last),) * slots
    operation = Operation("block", sizes, x.dtype, BitClass(None), (channels,) * slots, (3, 3), None, "relu")
    programs = min(choose_block.tiles_of(sizes, tile), sms * tile.programs_per_sm)
    return Launch(block_kernel, programs, arguments, tile, x.device, operation, registers=tile.registers)


def block(
    x: Tensor,
    table: Tensor,
    columns: Sequence[int],
    rows: Tensor,
    control: Tensor,
    summed: Tensor,
    out: Tensor,
    **options: Any,
) -> None:
    """A 3 by 3 convolution, the 1 by 1 that adds a residual to it, and the 1 by 1 that reads the sum.

    For active slots t, with ReLU a and epilogues as :func:`torch_mux.lowering.kernels.conv.conv` has them,

    - ``middle = a(conv2d(x[t], W0[t], padding=1) * scale0 + shift0)``,
    - ``summed[t] = a(conv2d(middle, W1[t]) * scale1 + shift1 + residual[t])``,
    - ``out[t] = a(conv2d(summed[t], W2[t]) * scale2 + shift2)``,

    each rounded once to x's dtype, so that the bits are those of three launches of ``conv``; but the middle
    is never written. Slots at and behind ``control[0]`` are neither read nor written.

    Args:
        x: [T, N, H, W, C] contiguous, fp16 or bf16.
        table: int64 [capacity, P], addresses; slot t's weights, in memory contiguous [C, 3, 3, C], [S, C] and
            [O, S], are at ``table[rows[t], columns]``.
        columns: three.
        rows: int64 [T].
        control: int32 [2], active slots and cap in multiprocessors, read on the device.
        summed: [T, N, H, W, S] contiguous.
        out: [T, N, H, W, O] contiguous.
        residual: like summed.
        scales, shifts: three :class:`Vector` of one arena each; scales may be None.
        aligned: every address in the columns is a multiple of 16 bytes.
        tile, sms: instead of what :mod:`choose_block` and the device say.

    Raises:
        ValueError: an operand the kernel cannot read, or a size that one launch is not for.
    """
    block_launch(x, table, columns, rows, control, summed, out, **options).run()

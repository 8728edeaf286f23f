"""The super-kernel of ``linear``, ``addmm`` and ``mm``: one launch for every slot's own weight.

A persistent loop over the tiles of all slots (after the grouped GEMM of Triton's tutorials and the
coalesced super-kernels of arXiv 1901.10008), weights reached through a table of pointers.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import torch
import triton
from torch import Tensor

from torch_mux import compat
from torch_mux.lowering.kernels import choose
from torch_mux.lowering.kernels.common import (
    Activation,
    Launch,
    check_operands,
    divisor,
    multiprocessors,
    settled,
    vector_arguments,
)
from torch_mux.lowering.kernels.data import BitClass, Part, Problems, Tile, Vector
from torch_mux.lowering.kernels.linear_kernel import linear_kernel
from torch_mux.lowering.kernels.operation import linear_operation

__all__ = ["dtype_of", "linear", "linear_launch", "linear_problems"]


def linear_problems(
    sizes: Sequence[tuple[int, int, int]],
    x_offsets: Sequence[int],
    out_offsets: Sequence[int],
    device: torch.device,
    weight_strides: Sequence[int] | None = None,
) -> Problems:
    """The ragged problem list of :func:`linear`.

    Args:
        sizes: (m, n, k) of every slot.
        x_offsets, out_offsets: where slot t's [m, k] and [m, n] matrices start, in elements of the flat
            buffers; multiples of 16 keep loads wide.
        device: where the list goes.
        weight_strides: the leading stride of every slot's weight, in elements; k (``nn.Linear``) by default.

    Raises:
        ValueError: lists of different lengths.
    """
    strides = [k for _, _, k in sizes] if weight_strides is None else list(weight_strides)
    records = [
        (m, n, k, x_offset, out_offset, stride)
        for (m, n, k), x_offset, out_offset, stride in zip(
            sizes, x_offsets, out_offsets, strides, strict=True
        )
    ]
    divisors = (
        divisor(*(k for _, _, k in sizes), *strides),
        divisor(*(n for _, n, _ in sizes)),
        divisor(*x_offsets, *out_offsets),
    )
    return Problems(torch.tensor(records, dtype=torch.int64).to(device), tuple(sizes), divisors)


def part_count(parts: int) -> int:
    """Records in a list of so many parts: those behind the parts are of no width."""
    return max(4, 1 << (parts - 1).bit_length())


def part_records(parts: tuple[Part, ...], like: Tensor) -> Tensor:
    """``parts`` as int64 [:func:`part_count`, fields] where ``like`` is, and a fake tensor if that is one."""
    if compat.is_fake(like):
        return torch.empty((part_count(len(parts)), 6), dtype=torch.int64, device=like.device)
    return _records(parts, like.device)


@cache
def _records(parts: tuple[Part, ...], device: torch.device) -> Tensor:
    """Kept for good: captured graphs read it."""
    ends = list(accumulate(part.n for part in parts))
    records = [
        (part.n, end - part.n, part.column, part.stride, part.scale_offset, part.shift_offset)
        for part, end in zip(parts, ends, strict=True)
    ]
    records += [(0,) * 6] * (part_count(len(parts)) - len(parts))
    with torch.inference_mode(False):
        found = torch.tensor(records, dtype=torch.int64).to(device)
    if device.type == "cuda":  # the next stream that reads it is not ordered behind this one
        torch.cuda.current_stream(device).synchronize()
    return found


def _geometry(
    x: Tensor,
    out: Tensor,
    n: int,
    k: int,
    leading: int,
    parts: tuple[Part, ...],
    problems: Problems | None,
) -> tuple[dict[str, Any], tuple[tuple[int, int, int], ...]]:
    """The kernel's size arguments and the (m, n, k) of every slot."""
    if problems is not None:
        divisors = problems.divisors
        sizes = problems.sizes
        named = {"slots": len(sizes), "m": 0, "n": 0, "k": 0, "stride": 0, "problems": problems.records}
        named |= {"RAGGED": True, "SLOTS": triton.next_power_of_2(len(sizes)), "PARTS": 1, "parts": None}
        named |= {
            "K_DIV": divisors[0],
            "N_DIV": divisors[1],
            "DATA_DIV": divisors[2],
            "STRIDE_DIV": divisors[0],
        }
        return named, sizes
    slots, m = x.shape[0], x.numel() // max(1, x.shape[0] * k)
    if x.shape[-1] != k or out.shape != (*x.shape[:-1], n):
        raise ValueError(f"x {tuple(x.shape)} and out {tuple(out.shape)} do not fit n={n}, k={k}")
    named = {
        "slots": slots,
        "m": m,
        "n": n,
        "k": k,
        "stride": leading,
        "problems": None,
        "RAGGED": False,
        "SLOTS": 1,
    }
    widths, strides = [n], [leading]
    named |= {"PARTS": 1, "parts": None}
    if parts:  # each is a problem to the chooser
        widths, strides = [part.n for part in parts], [part.stride for part in parts]
        records = part_records(parts, x)
        named |= {"PARTS": len(records), "parts": records}
    named |= {"K_DIV": divisor(k), "N_DIV": divisor(*widths), "DATA_DIV": 1, "STRIDE_DIV": divisor(*strides)}
    return named, tuple((m, width, k) for width in widths) * slots


def dtype_of(vector: Vector | None) -> torch.dtype | None:
    """Of a vector's elements."""
    return None if vector is None else vector.arena.dtype


def linear_launch(
    x: Tensor,
    table: Tensor,
    column: int,
    rows: Tensor,
    control: Tensor,
    out: Tensor,
    *,
    n: int,
    k: int,
    weight_strides: tuple[int, int] | None = None,
    scale: Vector | None = None,
    shift: Vector | None = None,
    residual: Tensor | None = None,
    activation: Activation | str = Activation.NONE,
    allow_tf32: bool = False,
    aligned: bool = True,
    parts: Sequence[Part] = (),
    problems: Problems | None = None,
    tile: Tile | None = None,
    bit_class: BitClass | None = None,
    sms: int | None = None,
) -> Launch:
    """What :func:`linear` runs; same arguments and errors."""
    if parts and (problems is not None or len(parts) == 1 or sum(part.n for part in parts) != n):
        raise ValueError(f"two or more parts must fill the {n} output channels, of slots of one size")
    check_operands(x, out, residual, table, rows, control)
    stride_n, stride_k = (k, 1) if weight_strides is None else weight_strides
    if 1 not in (stride_n, stride_k):
        raise ValueError(f"one stride of the weight must be 1, not {(stride_n, stride_k)}")
    k_major = stride_k == 1
    named, sizes = _geometry(x, out, n, k, stride_n if k_major else stride_k, tuple(parts), problems)
    total = n if parts else 0
    if any(max(m * kk, m * max(nn, total), nn * kk) >= 2**31 for m, nn, kk in set(sizes)):
        raise ValueError("a slot's matrices must have less than 2**31 elements each")
    sms = multiprocessors(x.device) if sms is None else sms
    bit_class = choose.linear_class(sizes, x.dtype, allow_tf32) if bit_class is None else bit_class
    if tile is None:
        divided = min(named["K_DIV"], named["STRIDE_DIV"], 16 if problems is None else named["DATA_DIV"])
        wide, lean = aligned and divided * x.dtype.itemsize >= 16, k_major and problems is None
        tile = choose.tile(sizes, x.dtype, bit_class, sms, lean=lean, wide=wide, settled=settled(x.device))
    choose.check(tile, bit_class)
    programs = min(choose.tiles_of(sizes, tile), sms * tile.programs_per_sm)
    arguments = {
        "x": x, "table": table, "rows": rows, "control": control, "out": out, "residual": residual,
        "width": table.stride(0), "column": column,
        **named, **vector_arguments("scale", scale), **vector_arguments("shift", shift),
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "SECOND_N": tile.second_n, "BLOCK_K": tile.block_k,
        "GROUP": 8, "PROGRAMS_PER_SM": tile.programs_per_sm, "K_MAJOR": k_major, "ALIGNED": aligned,
        "EVEN_N": all(nn % tile.width == 0 for _, nn, _ in sizes),
        "EVEN_K": all(kk % tile.block_k == 0 for _, _, kk in sizes),
        "SWAP": tile.swap or bit_class.swap, "PRECISION": bit_class.precision,
        "ACTIVATION": Activation(activation).value,
    }  # fmt: skip
    operation = linear_operation(
        sizes, x.dtype, bit_class, k_major=k_major, aligned=aligned, residual=residual is not None,
        scale=dtype_of(scale), shift=dtype_of(shift), activation=activation, parts=len(parts),
        ragged=problems is not None,
    )  # fmt: skip
    return Launch(linear_kernel, programs, arguments, tile, x.device, operation, registers=tile.registers)


def linear(
    x: Tensor,
    table: Tensor,
    column: int,
    rows: Tensor,
    control: Tensor,
    out: Tensor,
    *,
    n: int,
    k: int,
    **options: Any,
) -> None:
    """``out[t] = activation((x[t] @ W[t].T) * scale[t] + shift[t] + residual[t])`` for every active slot t.

    Accumulates in fp32 and rounds once. Bits depend on (m, n, k), dtype and ``allow_tf32`` only: not on T,
    slot, cap or how many slots are active. Slots at and behind ``control[0]`` are neither read nor written.

    Args:
        x: [T, ..., K] contiguous, fp16, bf16 or fp32; with ``problems`` a flat buffer.
        table: int64 [capacity, P], addresses; slot t's weight is at ``table[rows[t], column]``.
        rows: int64 [T].
        control: int32 [2], active slots and cap in multiprocessors, read on the device.
        out: [T, ..., N] contiguous, of x's dtype; with ``problems`` a flat buffer.
        n, k: sizes of the weight (its logical shape is [n, k]); the largest ones with ``problems``.
        weight_strides: (stride along n, stride along k) in elements, one of them 1; (k, 1) by default. Of
            ``problems`` only which one is 1 is read.
        scale, shift: a :class:`Vector` [n], or None.
        residual: like out, added before the activation, or None.
        activation: an :class:`Activation` or its value.
        allow_tf32: fp32 operands are rounded to tf32 for the tensor cores.
        aligned: every address in the column is a multiple of 16 bytes.
        parts: several weights of a slot instead of one, all with the dense dimension that ``weight_strides``
            names: their outputs lie side by side in ``out``, with the bits that a launch each would give.
            They must share a bit class; ``column``, ``n`` and the offsets of ``scale`` and ``shift`` are
            theirs then, and ``n`` is their sum.
        problems: a ragged list from :func:`linear_problems`.
        tile, bit_class, sms: instead of what :mod:`choose` and the device say.

    Raises:
        ValueError: an operand the kernel cannot read, or a tile outside the bit class.
    """
    linear_launch(x, table, column, rows, control, out, n=n, k=k, **options).run()

"""The super-kernel of 2-d convolution: one launch for every slot's own weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from torch_mux.lowering.kernels import choose
from torch_mux.lowering.kernels.common import (
    Activation,
    Launch,
    check_operands,
    divisor,
    multiprocessors,
    precision_of,
    vector_arguments,
)
from torch_mux.lowering.kernels.conv_kernel import conv_kernel
from torch_mux.lowering.kernels.data import BitClass, Problems, Tile, Vector
from torch_mux.lowering.kernels.linear import linear_launch

__all__ = ["conv", "conv_launch", "conv_problems", "out_size"]

Pair = tuple[int, int]


def out_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Output pixels along one axis."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def conv_problems(
    shapes: Sequence[tuple[int, int, int, int, int]],
    x_offsets: Sequence[int],
    out_offsets: Sequence[int],
    device: torch.device,
    *,
    kernel: Pair,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
) -> Problems:
    """The ragged problem list of :func:`conv`.

    Args:
        shapes: (images, height, width, channels in, channels out) of every slot.
        x_offsets, out_offsets: where slot t's input and output start, in elements of the flat buffers;
            multiples of 16 keep loads wide.
        device: where the list goes.

    Raises:
        ValueError: lists of different lengths.
    """
    records, sizes = [], []
    for (images, height, width, c, o), x_offset, out_offset in zip(
        shapes, x_offsets, out_offsets, strict=True
    ):
        oh = out_size(height, kernel[0], stride[0], padding[0], dilation[0])
        ow = out_size(width, kernel[1], stride[1], padding[1], dilation[1])
        records.append((images * oh * ow, o, height, width, c, oh, ow, x_offset, out_offset))
        sizes.append((images * oh * ow, o, kernel[0] * kernel[1] * c))
    divisors = (
        divisor(*(shape[3] for shape in shapes)),
        divisor(*(shape[4] for shape in shapes)),
        divisor(*x_offsets, *out_offsets),
    )
    return Problems(torch.tensor(records, dtype=torch.int64).to(device), tuple(sizes), divisors)


def _geometry(
    x: Tensor,
    out: Tensor,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    problems: Problems | None,
) -> tuple[dict[str, Any], tuple[tuple[int, int, int], ...], tuple[int, ...]]:
    """The kernel's size arguments, the (m, n, k) of every slot and their input channels."""
    taps = kernel[0] * kernel[1]
    if problems is not None:
        c_div, n_div, data_div = problems.divisors
        named: dict[str, Any] = dict.fromkeys(("m", "n", "height", "width", "out_height", "out_width"), 0)
        named |= {"slots": len(problems.sizes), "problems": problems.records, "RAGGED": True, "C": 0}
        named |= {"SLOTS": triton.next_power_of_2(len(problems.sizes))}
        named |= {"C_DIV": c_div, "N_DIV": n_div, "DATA_DIV": data_div}
        return named, problems.sizes, tuple(k // taps for _, _, k in problems.sizes)
    if x.dim() != 5 or out.dim() != 5:
        raise ValueError(f"x and out must be [T, N, H, W, C], not {tuple(x.shape)} and {tuple(out.shape)}")
    slots, images, height, width, c = x.shape
    oh = out_size(height, kernel[0], stride[0], padding[0], dilation[0])
    ow = out_size(width, kernel[1], stride[1], padding[1], dilation[1])
    n = out.shape[4]
    if out.shape != (slots, images, oh, ow, n):
        raise ValueError(f"out must be {(slots, images, oh, ow, n)}, not {tuple(out.shape)}")
    m = images * oh * ow
    named = {
        "slots": slots,
        "m": m,
        "n": n,
        "height": height,
        "width": width,
        "out_height": oh,
        "out_width": ow,
    }
    named |= {"problems": None, "RAGGED": False, "SLOTS": 1, "C": c}
    named |= {"C_DIV": divisor(c), "N_DIV": divisor(n), "DATA_DIV": 1}
    return named, ((m, n, taps * c),) * slots, (c,) * slots


def conv_launch(
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
    allow_tf32: bool = False,
    aligned: bool = True,
    problems: Problems | None = None,
    tile: Tile | None = None,
    bit_class: BitClass | None = None,
    sms: int | None = None,
    pdl: bool = False,
) -> Launch:
    """What :func:`conv` runs; same arguments and errors."""
    if kernel == (1, 1) and stride == (1, 1) and padding == (0, 0) and problems is None and x.dim() == 5:
        return linear_launch(
            x, table, column, rows, control, out, n=out.shape[-1], k=x.shape[-1], scale=scale, shift=shift,
            residual=residual, activation=activation, allow_tf32=allow_tf32, aligned=aligned, tile=tile,
            bit_class=bit_class, sms=sms, pdl=pdl,
        )  # fmt: skip
    check_operands(x, out, residual, table, rows, control)
    named, sizes, channels = _geometry(x, out, kernel, stride, padding, dilation, problems)
    if problems is None and max(x[0].numel(), out[0].numel()) >= 2**31:
        raise ValueError("a slot's input and output must have less than 2**31 elements each")
    sms = multiprocessors(x.device) if sms is None else sms
    taps = kernel[0] * kernel[1]
    bit_class = bit_class or choose.conv_class(sizes, channels, taps, x.dtype, allow_tf32)
    if tile is None:
        divided = min(16 if bit_class.gather else named["C_DIV"], named["DATA_DIV"] if problems else 16)
        wide = aligned and divided * x.dtype.itemsize >= 16
        tile = choose.conv_tile(sizes, channels, x.dtype, bit_class, sms, wide=wide)
    choose.check(tile, bit_class, x.dtype)
    reduction = [taps * c for c in channels] if bit_class.gather else channels
    arguments = {
        "x": x, "table": table, "rows": rows, "control": control, "out": out, "residual": residual,
        "table_width": table.stride(0), "column": column,
        **named, **vector_arguments("scale", scale), **vector_arguments("shift", shift),
        "KH": kernel[0], "KW": kernel[1], "SH": stride[0], "SW": stride[1],
        "PH": padding[0], "PW": padding[1],
        "DH": dilation[0], "DW": dilation[1],
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP": 8,
        "PROGRAMS_PER_SM": tile.programs_per_sm, "GATHER": bit_class.gather, "ALIGNED": aligned,
        "EVEN_K": all(c % tile.block_k == 0 for c in reduction),
        "SWAP": bit_class.swap, "PRECISION": precision_of(x.dtype, allow_tf32),
        "ACTIVATION": Activation(activation).value, "PDL": pdl,
    }  # fmt: skip
    grid = min(choose.tiles_of(sizes, tile), sms * tile.programs_per_sm)
    return Launch(conv_kernel, grid, arguments, tile, x.device, pdl)


def conv(
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
    """``out[t] = activation(conv2d(x[t], W[t]) * scale[t] + shift[t] + residual[t])`` for active slots t.

    Accumulates in fp32 and rounds once. Bits depend on a slot's shapes, dtype and ``allow_tf32`` only: not
    on T, slot, cap or how many slots are active. Slots at and behind ``control[0]`` are neither read nor
    written.

    Args:
        x: [T, N, H, W, C] contiguous, fp16, bf16 or fp32; with ``problems`` a flat buffer.
        table: int64 [capacity, P], addresses; slot t's weight, contiguous [O, KH, KW, C] in memory, is at
            ``table[rows[t], column]``.
        rows: int64 [T].
        control: int32 [2], active slots and cap in multiprocessors, read on the device.
        out: [T, N, OH, OW, O] contiguous, of x's dtype; with ``problems`` a flat buffer.
        kernel, stride, padding, dilation: (along H, along W).
        scale, shift: a :class:`Vector` [O], or None.
        residual: like out, added before the activation, or None.
        activation: an :class:`Activation` or its value.
        allow_tf32: fp32 operands are rounded to tf32 for the tensor cores.
        aligned: every address in the column is a multiple of 16 bytes.
        problems: a ragged list from :func:`conv_problems`.
        tile, bit_class, sms: instead of what :mod:`choose` and the device say.
        pdl: programmatic dependent launch: waits for the kernel before it on the device.

    Raises:
        ValueError: an operand the kernel cannot read, or a tile outside the bit class.
    """
    conv_launch(x, table, column, rows, control, out, kernel=kernel, **options).run()

"""The super-kernel of 2-d convolution: one launch for every slot's own weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from torch_mux.lowering.kernels import choose
from torch_mux.lowering.kernels.common import (
    Activation,
    Launch,
    check_operands,
    multiprocessors,
    settled,
    vector_arguments,
)
from torch_mux.lowering.kernels.conv_kernel import conv_kernel
from torch_mux.lowering.kernels.data import BitClass, Problems, Tile, Vector
from torch_mux.lowering.kernels.depthwise import depthwise_launch
from torch_mux.lowering.kernels.geometry import Pair, conv_problems, geometry, out_size
from torch_mux.lowering.kernels.linear import dtype_of, linear_launch
from torch_mux.lowering.kernels.operation import Operation, conv_form

__all__ = ["conv", "conv_launch", "conv_problems", "cut", "loaded_at_once", "out_size"]


def loaded_at_once(named: Mapping[str, Any], bit_class: BitClass) -> int:
    """Elements, at least, that a load of weights and of pixels that are not gathered may take at once."""
    data = named["DATA_DIV"] if named["RAGGED"] else 16
    return min(16 if bit_class.gather else named["C_DIV"], data)


def cut(tile: Tile, bit_class: BitClass, reduction: Sequence[int]) -> dict[str, Any]:
    """The kernel arguments of a tile, whose steps run over ``reduction`` elements of every slot's groups."""
    if tile.second_n or tile.swap:
        raise ValueError(f"{tile} has two widths or swaps, which is for linear layers only")
    return {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP": 8,
        "PROGRAMS_PER_SM": tile.programs_per_sm, "GATHER": bit_class.gather, "SWAP": bit_class.swap,
        "EVEN_K": all(c % tile.block_k == 0 for c in reduction),
    }  # fmt: skip


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
    groups: int = 1,
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
) -> Launch:
    """What :func:`conv` runs; same arguments and errors."""
    pointwise = kernel == (1, 1) and stride == (1, 1) and padding == (0, 0) and groups == 1
    steps: dict[str, Any] = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    common: dict[str, Any] = {
        "scale": scale, "shift": shift, "residual": residual, "activation": activation, "aligned": aligned,
        "tile": tile, "sms": sms,
    }  # fmt: skip
    if pointwise and problems is None and x.dim() == 5:
        common |= {"allow_tf32": allow_tf32, "bit_class": bit_class}
        return linear_launch(x, table, column, rows, control, out, n=out.shape[-1], k=x.shape[-1], **common)
    if 1 < groups == x.shape[-1] and problems is None:
        return depthwise_launch(x, table, column, rows, control, out, **steps, **common)
    check_operands(x, out, residual, table, rows, control)
    named, sizes, channels = geometry(x, out, kernel, stride, padding, dilation, groups, problems)
    sms, taps = multiprocessors(x.device) if sms is None else sms, kernel[0] * kernel[1]
    bit_class = bit_class or choose.conv_class(sizes, channels, taps, x.dtype, allow_tf32)
    if tile is None:
        wide, known = aligned and loaded_at_once(named, bit_class) * x.dtype.itemsize >= 16, settled(x.device)
        tile = choose.conv_tile(sizes, channels, x.dtype, bit_class, sms, wide=wide, settled=known)
    choose.check(tile, bit_class)
    name = Activation(activation).value
    arguments = {
        "x": x, "table": table, "rows": rows, "control": control, "out": out, "residual": residual,
        "table_width": table.stride(0), "column": column,
        **named, **vector_arguments("scale", scale), **vector_arguments("shift", shift),
        "KH": kernel[0], "KW": kernel[1], "SH": stride[0], "SW": stride[1],
        "PH": padding[0], "PW": padding[1], "DH": dilation[0], "DW": dilation[1], "GROUPS": groups,
        **cut(tile, bit_class, [taps * c for c in channels] if bit_class.gather else channels),
        "PRECISION": bit_class.precision, "ALIGNED": aligned, "ACTIVATION": name,
    }  # fmt: skip
    programs = min(choose.tiles_of(sizes, tile), sms * tile.programs_per_sm)
    added: tuple[Any, ...] = (dtype_of(scale), dtype_of(shift), residual, name, aligned, problems is not None)
    form = conv_form(tuple(steps.values()), channels, groups, *added)
    operation = Operation("conv", sizes, x.dtype, bit_class, channels, kernel, form, name)
    return Launch(conv_kernel, programs, arguments, tile, x.device, operation, registers=tile.registers)


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
        table: int64 [capacity, P], addresses; slot t's weight, in memory contiguous [O, KH, KW, C / groups],
            or [KH, KW, O] where C = groups > 1, is at ``table[rows[t], column]``.
        rows: int64 [T].
        control: int32 [2], active slots and cap in multiprocessors, read on the device.
        out: [T, N, OH, OW, O] contiguous, of x's dtype; with ``problems`` a flat buffer.
        kernel, stride, padding, dilation: (along H, along W).
        groups: of channels; every group is a GEMM of its own, whose sizes decide the bit class.
        scale, shift: a :class:`Vector` [O], or None.
        residual: like out, added before the activation, or None.
        activation: an :class:`Activation` or its value.
        allow_tf32: fp32 operands are rounded to tf32 for the tensor cores.
        aligned: every address in the column is a multiple of 16 bytes.
        problems: a ragged list from :func:`conv_problems`.
        tile, bit_class, sms: instead of what :mod:`choose` and the device say.

    Raises:
        ValueError: an operand the kernel cannot read, or a tile outside the bit class.
    """
    conv_launch(x, table, column, rows, control, out, kernel=kernel, **options).run()

"""``mux::slot_linear``, ``mux::slot_convolution``, ``mux::slot_embedding``: a bundle of slots in one call.

Slot ``t`` reads its weight through ``table[rows[t], column]`` and its epilogue vectors from
``arena[rows[t]]``. On CUDA each call is one super-kernel launch. On the CPU each slot is one vendor call over
its weight, because merging rows or groups there would change bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.data import Part, Vector
from ..storage import storage_of
from . import turns
from .semantic import LIBRARY, apply_activation
from .turns import taking_turns
from .vendor import aligned

__all__ = ["SLOT_CONVOLUTION", "SLOT_EMBEDDING", "SLOT_LINEAR"]

_EPILOGUE = (
    "Tensor? scale, int scale_offset, Tensor? shift, int shift_offset, Tensor? residual, str activation, "
    "bool allow_tf32, str program"
)
LIBRARY.define(
    "slot_linear(Tensor x, Tensor table, Tensor rows, Tensor control, int[] columns, int[] widths, "
    "int[] weight_strides, Tensor? scale, int[] scale_offsets, Tensor? shift, int[] shift_offsets, "
    "Tensor? residual, str activation, bool allow_tf32, str program) -> Tensor"
)
LIBRARY.define(
    "slot_convolution(Tensor x, Tensor table, Tensor rows, Tensor control, int column, int n, int[] kernel, "
    f"int[] stride, int[] padding, int[] dilation, int groups, {_EPILOGUE}) -> Tensor"
)
LIBRARY.define(
    "slot_embedding(Tensor indices, Tensor table, Tensor rows, Tensor control, int column, int vocabulary, "
    "int width, ScalarType dtype, str program) -> Tensor"
)


def _vectors(arena: Tensor, offset: int, rows: Tensor, out: Tensor) -> Tensor:
    """The slots' vectors [T, 1, …, n] in the dtype of ``out``."""
    chosen = arena.narrow(1, offset, out.shape[-1]).index_select(0, rows)
    shape = (out.shape[0], *([1] * (out.dim() - 2)), out.shape[-1])
    return chosen.view(shape) if chosen.dtype == out.dtype else chosen.view(shape).to(out.dtype)


def _epilogue_(
    out: Tensor,
    rows: Tensor,
    scale: Tensor | None,
    scale_offset: int,
    shift: Tensor | None,
    shift_offset: int,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """The epilogue over all slots at once, in float32 for half-precision results; it may write ``out``."""
    dtype = out.dtype
    wide = out.float() if dtype in (torch.float16, torch.bfloat16) else out
    if scale is not None and shift is not None:
        added = _vectors(shift, shift_offset, rows, wide)
        wide = torch.addcmul(added, wide, _vectors(scale, scale_offset, rows, wide))
    elif scale is not None:
        wide = wide.mul_(_vectors(scale, scale_offset, rows, wide))
    elif shift is not None:
        wide = wide.add_(_vectors(shift, shift_offset, rows, wide))
    if residual is not None:
        wide = wide.add_(residual)
    if activation == "relu":
        wide = wide.relu_()
    elif activation != "none":
        for slot in wide.unbind(0):  # ATen takes other code for a tensor's last elements, with other bits
            slot.copy_(apply_activation(slot, activation))
    return wide if wide.dtype == dtype else wide.to(dtype)


def _biases(
    x: Tensor, rows: Sequence[int], n: int, scale: Tensor | None, shift: Tensor | None, offset: int
) -> tuple[Sequence[Tensor | None], Tensor | None]:
    """(a bias a slot for the vendor call, the shift left over): a plain bias is added before rounding."""
    if scale is not None or shift is None or shift.dtype != x.dtype:
        return [None] * len(rows), shift
    return [shift[row, offset : offset + n] for row in rows], None


def _linear_cpu(
    x: Tensor,
    table: Tensor,
    rows: Tensor,
    control: Tensor,
    columns: Sequence[int],
    widths: Sequence[int],
    weight_strides: Sequence[int],
    scale: Tensor | None,
    scale_offsets: Sequence[int],
    shift: Tensor | None,
    shift_offsets: Sequence[int],
    residual: Tensor | None,
    activation: str,
    allow_tf32: bool,
    program: str,
) -> Tensor:
    numbers, storage = rows.tolist(), storage_of(program)
    operands = [aligned(rows_in) for rows_in in x.unbind(0)]
    addends: Sequence[Tensor | None] = [None] * len(widths)
    if residual is not None:
        addends = torch.split(residual, list(widths), -1)
    outs = []
    parts = zip(columns, widths, scale_offsets, shift_offsets, addends, strict=True)
    for column, n, scale_offset, shift_offset, addend in parts:
        biases, left = _biases(x, numbers, n, scale, shift, shift_offset)
        slots = zip(operands, storage.weights(numbers, column), biases, strict=True)
        out = torch.stack([F.linear(*slot) for slot in slots])
        outs.append(_epilogue_(out, rows, scale, scale_offset, left, shift_offset, addend, activation))
    return outs[0] if len(outs) == 1 else torch.cat(outs, -1)


def _convolution_cpu(
    x: Tensor,
    table: Tensor,
    rows: Tensor,
    control: Tensor,
    column: int,
    n: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    scale: Tensor | None,
    scale_offset: int,
    shift: Tensor | None,
    shift_offset: int,
    residual: Tensor | None,
    activation: str,
    allow_tf32: bool,
    program: str,
) -> Tensor:
    numbers = rows.tolist()
    weights = storage_of(program).weights(numbers, column)
    biases, shift = _biases(x, numbers, n, scale, shift, shift_offset)
    steps = (list(stride), list(padding), list(dilation), groups)
    slots = zip(x.permute(0, 1, 4, 2, 3).unbind(0), weights, biases, strict=True)
    images = [F.conv2d(aligned(image), weight, bias, *steps) for image, weight, bias in slots]
    out = torch.stack([image.permute(0, 2, 3, 1) for image in images])
    return _epilogue_(out, rows, scale, scale_offset, shift, shift_offset, residual, activation)


def _embedding_cpu(
    indices: Tensor,
    table: Tensor,
    rows: Tensor,
    control: Tensor,
    column: int,
    vocabulary: int,
    width: int,
    dtype: torch.dtype,
    program: str,
) -> Tensor:
    weights = storage_of(program).weights(rows.tolist(), column)
    return torch.stack(
        [F.embedding(index, weight) for index, weight in zip(indices.unbind(0), weights, strict=True)]
    )


def _vector(arena: Tensor | None, offset: int) -> Vector | None:
    return None if arena is None else Vector(arena, offset)


def _linear_cuda(
    x: Tensor,
    table: Tensor,
    rows: Tensor,
    control: Tensor,
    columns: Sequence[int],
    widths: Sequence[int],
    weight_strides: Sequence[int],
    scale: Tensor | None,
    scale_offsets: Sequence[int],
    shift: Tensor | None,
    shift_offsets: Sequence[int],
    residual: Tensor | None,
    activation: str,
    allow_tf32: bool,
    program: str,
) -> Tensor:
    from ..kernels.linear import linear

    n = sum(widths)
    out = x.new_empty((x.shape[0], x.shape[1], n))
    pairs = list(zip(weight_strides[::2], weight_strides[1::2], strict=True))
    parts = [
        Part(column, width, max(pair), *offsets)
        for column, width, pair, *offsets in zip(
            columns, widths, pairs, scale_offsets, shift_offsets, strict=True
        )
    ]
    linear(
        x,
        table,
        columns[0],
        rows,
        control,
        out,
        n=n,
        k=x.shape[2],
        weight_strides=pairs[0],
        scale=_vector(scale, scale_offsets[0]),
        shift=_vector(shift, shift_offsets[0]),
        residual=residual,
        activation=activation,
        allow_tf32=allow_tf32,
        parts=parts if len(parts) > 1 else (),
    )
    return out


def _convolution_cuda(
    x: Tensor,
    table: Tensor,
    rows: Tensor,
    control: Tensor,
    column: int,
    n: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    scale: Tensor | None,
    scale_offset: int,
    shift: Tensor | None,
    shift_offset: int,
    residual: Tensor | None,
    activation: str,
    allow_tf32: bool,
    program: str,
) -> Tensor:
    from ..kernels.conv import conv

    out = x.new_empty(_convolution_shape(x, n, kernel, stride, padding, dilation))
    conv(
        x,
        table,
        column,
        rows,
        control,
        out,
        kernel=(kernel[0], kernel[1]),
        stride=(stride[0], stride[1]),
        padding=(padding[0], padding[1]),
        dilation=(dilation[0], dilation[1]),
        groups=groups,
        scale=_vector(scale, scale_offset),
        shift=_vector(shift, shift_offset),
        residual=residual,
        activation=activation,
        allow_tf32=allow_tf32,
    )
    return out


def _embedding_cuda(
    indices: Tensor,
    table: Tensor,
    rows: Tensor,
    control: Tensor,
    column: int,
    vocabulary: int,
    width: int,
    dtype: torch.dtype,
    program: str,
) -> Tensor:
    from ..kernels.embedding import embedding

    out = torch.empty((*indices.shape, width), dtype=dtype, device=indices.device)
    embedding(indices, table, column, rows, control, out, num_embeddings=vocabulary)
    return out


def _convolution_shape(
    x: Tensor,
    n: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, ...]:
    height, width = (
        (x.shape[axis + 2] + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1
        for axis in (0, 1)
    )
    return (x.shape[0], x.shape[1], height, width, n)


def _linear_fake(
    x: Tensor,
    table: Tensor,
    rows: Tensor,
    control: Tensor,
    columns: Sequence[int],
    widths: Sequence[int],
    *rest: object,
) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], sum(widths)))


def _convolution_fake(
    x: Tensor,
    table: Tensor,
    rows: Tensor,
    control: Tensor,
    column: int,
    n: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *rest: object,
) -> Tensor:
    return x.new_empty(_convolution_shape(x, n, kernel, stride, padding, dilation))


def _embedding_fake(
    indices: Tensor,
    table: Tensor,
    rows: Tensor,
    control: Tensor,
    column: int,
    vocabulary: int,
    width: int,
    dtype: torch.dtype,
    program: str,
) -> Tensor:
    return indices.new_empty((*indices.shape, width), dtype=dtype)


for _name, _cpu, _cuda, _fake, _describe in (
    ("slot_linear", _linear_cpu, _linear_cuda, _linear_fake, turns.linear),
    ("slot_convolution", _convolution_cpu, _convolution_cuda, _convolution_fake, turns.convolution),
    ("slot_embedding", _embedding_cpu, _embedding_cuda, _embedding_fake, turns.embedding),
):
    LIBRARY.impl(_name, taking_turns(_cpu, _describe), "CPU")
    LIBRARY.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"mux::{_name}", _fake, lib=LIBRARY)

SLOT_LINEAR: Final = torch.ops.mux.slot_linear.default
SLOT_CONVOLUTION: Final = torch.ops.mux.slot_convolution.default
SLOT_EMBEDDING: Final = torch.ops.mux.slot_embedding.default

"""Operations of the CPU take turns as launches do, where several programs run launch by launch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import choose, choose_attention
from ..kernels.interception import Turn, handed, intercepting
from ..kernels.operation import Operation, attention_operation, conv_form, linear_operation

__all__ = ["attention", "convolution", "embedding", "linear", "taking_turns"]


def taking_turns(compute: Callable[..., Tensor], describe: Callable[..., Operation]) -> Callable[..., Tensor]:
    """``compute``, which waits for its turn before it begins where somebody intercepts this thread's work.

    Args:
        describe: what ``compute`` does for the same arguments.
    """

    @functools.wraps(compute)
    def run(*args: Any) -> Tensor:
        if intercepting():
            handed(Turn(describe(*args)))
        return compute(*args)

    return run


def linear(
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
) -> Operation:
    """What ``slot_linear`` computes, as the launch on a GPU would say."""
    slots, m, k = x.shape
    vectors = (scale, shift, residual)
    return _linear((m, k), widths, slots, x.dtype, weight_strides, vectors, activation, allow_tf32)


def _linear(
    rows: tuple[int, int],
    widths: Sequence[int],
    slots: int,
    dtype: torch.dtype,
    weight_strides: Sequence[int],
    vectors: tuple[Tensor | None, Tensor | None, Tensor | None],
    activation: str,
    allow_tf32: bool,
) -> Operation:
    scale, shift, residual = vectors
    sizes = tuple((rows[0], width, rows[1]) for width in widths) * slots
    return linear_operation(
        sizes,
        dtype,
        choose.linear_class(sizes, dtype, allow_tf32),
        k_major=weight_strides[1] == 1,
        scale=None if scale is None else scale.dtype,
        shift=None if shift is None else shift.dtype,
        residual=residual is not None,
        activation=activation,
        parts=len(widths),
    )


def convolution(
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
) -> Operation:
    """What ``slot_convolution`` computes, as the launch on a GPU would say."""
    slots, batch, *image, channels = x.shape
    taps = math.prod(kernel)
    steps = zip(image, kernel, stride, padding, dilation, strict=True)
    m = batch * math.prod((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in steps)
    pair = (kernel[0], kernel[1])
    if taps == groups == math.prod(stride) == 1 and not any(padding):
        vectors = (scale, shift, residual)
        return _linear((m, channels), [n], slots, x.dtype, (channels, 1), vectors, activation, allow_tf32)
    if 1 < groups == channels:
        sizes = ((m, n, taps * channels),) * slots
        return Operation("depthwise", sizes, x.dtype, None, (channels,) * slots, pair, None, activation)
    each = channels // groups
    sizes, counts = ((m, n // groups, taps * each),) * (slots * groups), (each,) * (slots * groups)
    bit_class = choose.conv_class(sizes, counts, taps, x.dtype, allow_tf32)
    scaled, shifted = (None if vector is None else vector.dtype for vector in (scale, shift))
    form = conv_form(
        (kernel, stride, padding, dilation), counts, groups, scaled, shifted, residual, activation
    )
    return Operation("conv", sizes, x.dtype, bit_class, counts, pair, form, activation)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    control: Tensor,
    is_causal: bool,
    scale: float | None,
    allow_tf32: bool,
) -> Operation:
    """What ``slot_attention`` computes, as the launch on a GPU would say."""
    size = choose_attention.Size(query.shape[-2], key.shape[-2], query.shape[-1], value.shape[-1])
    bit_class = choose_attention.bit_class(size, query.dtype, allow_tf32)
    return attention_operation(query, key, value, bit_class)


def embedding(
    indices: Tensor,
    table: Tensor,
    rows: Tensor,
    control: Tensor,
    column: int,
    vocabulary: int,
    width: int,
    dtype: torch.dtype,
    program: str,
) -> Operation:
    """What ``slot_embedding`` computes, as the launch on a GPU would say."""
    slots = indices.shape[0]
    return Operation("embedding", ((indices.numel() // max(1, slots), width, 1),) * slots, dtype)

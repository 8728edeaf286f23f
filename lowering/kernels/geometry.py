"""Sizes of convolutions: output pixels, ragged problem lists and the kernels' size arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from torch_mux.lowering.kernels.common import divisor
from torch_mux.lowering.kernels.data import Problems

__all__ = ["Pair", "conv_problems", "geometry", "out_size"]

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
    groups: int = 1,
) -> Problems:
    """The ragged problem list of :func:`conv`.

    Args:
        shapes: (images, height, width, channels in, channels out) of every slot.
        x_offsets, out_offsets: where slot t's input and output start, in elements of the flat buffers;
            multiples of 16 keep loads wide.
        device: where the list goes.

    Raises:
        ValueError: lists of different lengths, or channels that ``groups`` does not divide.
    """
    records, sizes = [], []
    for (images, height, width, c, o), x_offset, out_offset in zip(
        shapes, x_offsets, out_offsets, strict=True
    ):
        if c % groups or o % groups:
            raise ValueError(f"{c} and {o} channels cannot be split into {groups} groups")
        c, o = c // groups, o // groups
        oh = out_size(height, kernel[0], stride[0], padding[0], dilation[0])
        ow = out_size(width, kernel[1], stride[1], padding[1], dilation[1])
        records.append((images * oh * ow, o, height, width, c, oh, ow, x_offset, out_offset))
        sizes.append((images * oh * ow, o, kernel[0] * kernel[1] * c))
    divisors = (
        divisor(*(shape[3] // groups for shape in shapes)),
        divisor(*(shape[4] // groups for shape in shapes)),
        divisor(*x_offsets, *out_offsets),
    )
    return Problems(torch.tensor(records, dtype=torch.int64).to(device), tuple(sizes), divisors)


def geometry(
    x: Tensor,
    out: Tensor,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    problems: Problems | None,
) -> tuple[dict[str, Any], tuple[tuple[int, int, int], ...], tuple[int, ...]]:
    """The kernel's size arguments, the (m, n, k) of every slot's groups and their input channels.

    Raises:
        ValueError: operands that do not fit each other, or too large for 32-bit offsets.
    """
    taps = kernel[0] * kernel[1]
    if problems is not None:
        c_div, n_div, data_div = problems.divisors
        named: dict[str, Any] = dict.fromkeys(("m", "n", "height", "width", "out_height", "out_width"), 0)
        named |= {"slots": len(problems.sizes), "problems": problems.records, "RAGGED": True, "C": 0}
        named |= {"SLOTS": triton.next_power_of_2(len(problems.sizes))}
        named |= {"C_DIV": c_div, "N_DIV": n_div, "DATA_DIV": data_div}
        sizes = tuple(size for size in problems.sizes for _ in range(groups))
        return named, sizes, tuple(k // taps for _, _, k in sizes)
    if x.dim() != 5 or out.dim() != 5:
        raise ValueError(f"x and out must be [T, N, H, W, C], not {tuple(x.shape)} and {tuple(out.shape)}")
    slots, images, height, width, inputs = x.shape
    oh = out_size(height, kernel[0], stride[0], padding[0], dilation[0])
    ow = out_size(width, kernel[1], stride[1], padding[1], dilation[1])
    outputs = out.shape[4]
    if out.shape != (slots, images, oh, ow, outputs):
        raise ValueError(f"out must be {(slots, images, oh, ow, outputs)}, not {tuple(out.shape)}")
    if inputs % groups or outputs % groups:
        raise ValueError(f"{inputs} and {outputs} channels cannot be split into {groups} groups")
    if max(x[0].numel(), out[0].numel()) >= 2**31:
        raise ValueError("a slot's input and output must have less than 2**31 elements each")
    c, n = inputs // groups, outputs // groups
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
    return named, ((m, n, taps * c),) * (slots * groups), (c,) * (slots * groups)

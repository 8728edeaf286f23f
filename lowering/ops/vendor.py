"""Operands of vendor code on the CPU, which chooses its instructions by their alignment and strides."""

from __future__ import annotations

from typing import Final

from torch import Tensor

__all__ = ["aligned"]

_ALIGNMENT: Final = 64  # bytes


def aligned(tensor: Tensor) -> Tensor:
    """``tensor`` dense and at an aligned address, its dimensions in the same order in memory.

    Whether it is a copy depends on the slot, so what it is must not.
    """
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    dense = reach + 1 == tensor.numel()
    return tensor if dense and tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()

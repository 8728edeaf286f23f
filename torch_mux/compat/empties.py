"""Uninitialised tensors without torch's argument parser and dispatcher, which take longer than the memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C._dynamo.guards import (  # type: ignore[attr-defined]
    _empty_strided_cpu,
    _empty_strided_cuda,
)

from .dynamo import active_modes

__all__ = ["empties"]


def empties(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Callable[[int], list[Tensor]]:
    """What makes so many uninitialised tensors of this form, inference tensors in inference mode.

    Inductor's own functions, half the time of ``torch.empty_strided``. That one still serves where torch
    function or dispatch modes are to see it, and a GPU that is not the current one.
    """

    def parsed(count: int) -> list[Tensor]:
        return [torch.empty_strided(shape, strides, dtype=dtype, device=device) for _ in range(count)]

    def on_cpu(count: int) -> list[Tensor]:
        if active_modes():
            return parsed(count)
        return [_empty_strided_cpu(shape, strides, dtype) for _ in range(count)]

    def on_gpu(count: int) -> list[Tensor]:
        if current is None or current() != index or active_modes():
            return parsed(count)
        return [_empty_strided_cuda(shape, strides, dtype) for _ in range(count)]

    index = device.index
    current: Callable[[], int] | None = getattr(torch._C, "_cuda_getDevice", None)
    return {"cpu": on_cpu, "cuda": on_gpu}.get(device.type, parsed)

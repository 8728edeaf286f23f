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
) -> Callable[[], Tensor]:
    """What makes uninitialised tensors of this form, inference tensors in inference mode.

    Inductor's own functions, half the time of ``torch.empty_strided``. That one still serves where torch
    function or dispatch modes are to see it, and a GPU that is not the current one.
    """

    def parsed() -> Tensor:
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)

    def on_cpu() -> Tensor:
        made: Tensor = parsed() if active_modes() else _empty_strided_cpu(shape, strides, dtype)
        return made

    def on_gpu() -> Tensor:
        direct = current is not None and current() == index and not active_modes()
        made: Tensor = _empty_strided_cuda(shape, strides, dtype) if direct else parsed()
        return made

    index = device.index
    current: Callable[[], int] | None = getattr(torch._C, "_cuda_getDevice", None)
    return {"cpu": on_cpu, "cuda": on_gpu}.get(device.type, parsed)

"""Operators' own kernels for a device, called without their tensors being there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

__all__ = ["device_kernel", "fake_tensors", "is_fake"]


def device_kernel(operator: Any, device_type: str) -> Callable[..., Any] | None:
    """What the dispatcher calls for tensors on ``device_type``, or None where nothing is registered.

    Fake tensors may be given to it: it sees their sizes and what it allocates is fake as well.
    """
    key = getattr(torch._C.DispatchKey, device_type.upper())
    if not isinstance(operator, torch._ops.OpOverload) or not operator.has_kernel_for_dispatch_key(key):
        return None
    keys = torch._C.DispatchKeySet(key)

    def call(*args: Any, **kwargs: Any) -> Any:
        return operator.redispatch(keys, *args, **kwargs)

    return call


def fake_tensors() -> AbstractContextManager[Any]:
    """Tensors made inside have sizes and a device but no memory; the device need not exist."""
    return FakeTensorMode()


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` has sizes and no memory; what is made for it must not be kept for real ones."""
    return isinstance(tensor, FakeTensor)

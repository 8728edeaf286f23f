"""Uninitialised outputs are what ``torch.empty_strided`` would have made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from torch_mux import compat

DEVICES = [pytest.param("cpu"), pytest.param("cuda:0", marks=pytest.mark.gpu)]


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64])
@pytest.mark.parametrize(
    ("shape", "strides"), [((2, 3), (3, 1)), ((2, 3), (1, 2)), ((), ()), ((0, 3), (3, 1))]
)
def test_form_and_inference_mode(
    device: str, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    make = compat.empties(shape, strides, dtype, torch.device(device))
    for inference in (False, True):
        with torch.inference_mode(inference):
            made, other = make(2)
            like = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        assert (made.shape, made.stride(), made.dtype) == (like.shape, like.stride(), like.dtype)
        assert made.device == like.device and made.layout == like.layout
        assert made.is_inference() == inference and not made.requires_grad
        assert made.untyped_storage().nbytes() == like.untyped_storage().nbytes()
        assert made is not other and made.untyped_storage()._cdata != other.untyped_storage()._cdata


@pytest.mark.parametrize("kind", [Seen, SeenFunctions])
@pytest.mark.parametrize("device", DEVICES)
def test_modes_see_them(device: str, kind: Any) -> None:
    make = compat.empties((2,), (1,), torch.float32, torch.device(device))
    with kind() as mode:
        make(2)
    assert sum("empty_strided" in name for name in mode.names) == 2


def test_other_devices() -> None:
    assert compat.empties((2,), (1,), torch.float32, torch.device("meta"))(1)[0].is_meta


@pytest.mark.gpu
def test_a_gpu_without_memory_for_them() -> None:
    make = compat.empties((1 << 50,), (1,), torch.float32, torch.device("cuda:0"))
    with pytest.raises(torch.OutOfMemoryError):
        make(1)

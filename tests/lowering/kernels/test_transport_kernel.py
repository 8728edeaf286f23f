"""Copies to and from slots in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_mux.lowering.kernels.transport import (
    axes,
    dense_kernel,
    gather,
    gather_launch,
    scatter,
    strided_kernel,
)

pytestmark = pytest.mark.interpreter

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool,
          torch.float64, torch.complex64]  # fmt: skip


def make(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, shift: int = 0) -> Tensor:
    """A tensor of these strides whose bits are random; ``shift`` elements into its storage."""
    extent = shift + 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if dtype is torch.bool:
        storage = torch.rand(extent) > 0.5
    else:
        storage = torch.randint(0, 120, (extent * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    return storage.as_strided(shape, strides, shift)


def round_trip(
    tools: Any,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    batched: Tensor,
    shift: int = 0,
) -> None:
    slots, active = batched.shape[0], batched.shape[0] - 1
    before = batched.clone()
    sources = [make(shape, strides, dtype, shift) for _ in range(slots)]
    addresses = torch.tensor([source.data_ptr() for source in sources])
    control = tools.control(active, 1)
    gather(addresses, batched, control, strides)
    for slot in range(active):
        assert torch.equal(batched[slot], sources[slot])
    assert torch.equal(batched[active:], before[active:])
    targets = [make(shape, strides, dtype, shift) for _ in range(slots)]
    kept = targets[-1].clone()
    scatter(batched, torch.tensor([target.data_ptr() for target in targets]), control, strides)
    for slot in range(active):
        assert torch.equal(targets[slot], sources[slot])
    assert torch.equal(targets[-1], kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [0, 1])
def test_dense(tools: Any, dtype: torch.dtype, shift: int) -> None:
    shape, strides = (3, 700), (700, 1)
    round_trip(tools, shape, strides, dtype, torch.zeros(3, *shape, dtype=dtype), shift)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transposed(tools: Any, dtype: torch.dtype) -> None:
    round_trip(tools, (3, 5, 7), (1, 3, 15), dtype, torch.zeros(3, 3, 5, 7, dtype=dtype))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (5,)])
def test_small(tools: Any, shape: tuple[int, ...]) -> None:
    round_trip(tools, shape, torch.zeros(shape).stride(), torch.float32, torch.zeros(2, *shape))


def test_channels_last_is_dense(tools: Any) -> None:
    batched = torch.zeros(2, 6, 5, 3).permute(0, 3, 1, 2)
    addresses, control = torch.zeros(2, dtype=torch.int64), tools.control(2, 1)
    assert gather_launch(addresses, batched, control, (1 * 90, 1, 15, 3)[1:]).kernel is dense_kernel
    assert gather_launch(addresses, batched, control, (30, 5, 1)).kernel is strided_kernel
    round_trip(tools, (3, 6, 5), (1, 15, 3), torch.float32, batched)


def test_expanded_sources(tools: Any) -> None:
    source = torch.arange(4.0).expand(3, 4)
    batched = torch.zeros(1, 3, 4)
    gather(torch.tensor([source.data_ptr()]), batched, tools.control(1, 1), source.stride())
    assert torch.equal(batched[0], source)
    with pytest.raises(ValueError, match="expanded"):
        scatter(batched, torch.tensor([source.data_ptr()]), tools.control(1, 1), source.stride())


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=6).map(tuple),
    data=st.data(),
)
def test_any_order_of_axes(shape: tuple[int, ...], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(shape))))
    gap = data.draw(st.integers(0, 2))
    strides, step = [0] * len(shape), 1
    for axis in order:
        strides[axis] = step
        step = step * shape[axis] + gap
    torch.manual_seed(0)
    source = make(shape, tuple(strides), torch.float32)
    batched = torch.zeros(1, *shape)
    control = torch.tensor([1, 1], dtype=torch.int32)
    gather(torch.tensor([source.data_ptr()]), batched, control, strides)
    assert torch.equal(batched[0], source)


def test_axes_merge() -> None:
    assert axes((2, 3, 4), (12, 4, 1), (12, 4, 1)) == [(24, 1, 1)]
    assert axes((2, 3, 4), (12, 4, 1), (1, 2, 6)) == [(4, 1, 6), (3, 4, 2), (2, 12, 1)]
    assert axes((1, 3, 1), (9, 1, 3), (7, 1, 3)) == [(3, 1, 1)]
    assert axes((), (), ()) == [(1, 1, 1)]


def test_refuses_what_it_cannot_copy(tools: Any) -> None:
    batched, addresses = torch.zeros(1, 2, 2), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="1 strides for slots of 2 axes"):
        gather(addresses, batched, tools.control(1, 1), (1,))
    with pytest.raises(ValueError, match="one address a slot"):
        gather(addresses[:0], batched, tools.control(1, 1), (2, 1))
    many = torch.zeros(1, *(2,) * 7)
    with pytest.raises(ValueError, match="at most 6"):
        gather(addresses, many, tools.control(1, 1), tuple(reversed(many.stride()[1:])))

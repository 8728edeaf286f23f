"""Rows, staleness and growth of the tables."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torch_mux.errors import TooManyInstances


def _function(x: Tensor, w: Tensor, b: Tensor, g: Tensor) -> Tensor:
    return F.linear(x, w, b) * g


@pytest.fixture
def case(batched: Callable[..., Any]) -> tuple[Any, list[Tensor], list[Tensor]]:
    x, parameters = torch.randn(3, 4), [torch.randn(5, 4), torch.randn(5), torch.randn(5)]
    return batched(_function, [x], parameters), [x], parameters


def test_in_place_writes_are_seen(case: tuple[Any, list[Tensor], list[Tensor]]) -> None:
    lowered, _, parameters = case
    storage = lowered.run.storage
    row = storage.bind(parameters)
    assert not storage.stale(row)
    parameters[0].add_(1)  # read through its address: nothing to refresh
    assert not storage.stale(row)
    parameters[1].add_(1)  # copied into the arena
    assert storage.stale(row)
    storage.refresh(row, parameters)
    assert not storage.stale(row)


def test_moved_weight_is_seen(case: tuple[Any, list[Tensor], list[Tensor]]) -> None:
    lowered, _, parameters = case
    storage = lowered.run.storage
    row = storage.bind(parameters)
    parameters[0].data = parameters[0].data.clone()
    assert storage.stale(row)


def test_optimizer_step_is_seen(case: tuple[Any, list[Tensor], list[Tensor]]) -> None:
    lowered, _, parameters = case
    storage = lowered.run.storage
    row = storage.bind(parameters)
    other = torch.nn.Parameter(torch.ones(1))
    other.grad = torch.ones(1)
    torch.optim.SGD([other], lr=0.1).step()
    assert storage.stale(row)


def test_parameters_of_inference_mode_are_always_read_again(
    case: tuple[Any, list[Tensor], list[Tensor]],
) -> None:
    lowered, _, _ = case
    with torch.inference_mode():
        parameters = [torch.randn(5, 4), torch.randn(5), torch.randn(5)]
    storage = lowered.run.storage
    row = storage.bind(parameters)
    assert storage.stale(row)
    storage.refresh(row, parameters)


def test_rows_are_reused_and_tables_grow(case: tuple[Any, list[Tensor], list[Tensor]]) -> None:
    lowered, inputs, parameters = case
    storage = lowered.run.storage
    generation, capacity = storage.generation, storage.capacity
    rows = [storage.bind(parameters) for _ in range(capacity)]
    assert len(set(rows)) == capacity and storage.generation == generation
    weights = [torch.randn(5, 4), torch.randn(5), torch.randn(5)]
    result = lowered.run([inputs], [weights])[0][0]  # one row more than there was room for
    assert storage.generation == generation + 1 and storage.capacity == 2 * capacity
    torch.testing.assert_close(result, _function(*inputs, *weights))
    for row in rows:
        storage.release(row)
    assert storage.bind(parameters) in rows


def test_growth_has_a_named_limit(case: tuple[Any, list[Tensor], list[Tensor]]) -> None:
    lowered, _, parameters = case
    storage = lowered.run.storage
    storage.most_rows = storage.capacity
    for _ in range(storage.capacity):
        storage.bind(parameters)
    with pytest.raises(TooManyInstances, match="remove"):
        storage.bind(parameters)


def test_misaligned_weight_is_copied(batched: Callable[..., Any]) -> None:
    flat = torch.randn(21)
    weight = flat[1:].view(5, 4)
    assert weight.data_ptr() % 16
    lowered = batched(lambda x, w: F.linear(x, w), [torch.randn(3, 4)], [torch.randn(5, 4)])
    storage = lowered.run.storage
    row = storage.bind([weight])
    assert storage.table[row, 0].item() % 16 == 0
    weight.add_(1)
    assert storage.stale(row)


def test_storage_keeps_no_parameter_object_alive(case: tuple[Any, list[Tensor], list[Tensor]]) -> None:
    import weakref

    lowered, _, _ = case
    storage = lowered.run.storage
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((5, 4), (5,), (5,))]
    row, alive = storage.bind(parameters), [weakref.ref(parameter) for parameter in parameters]
    del parameters
    gc.collect()
    assert not any(reference() is not None for reference in alive)
    storage.release(row)


def test_nbytes_counts_copies(batched: Callable[..., Any]) -> None:
    plain = batched(lambda x, w: F.conv2d(x, w), [torch.randn(1, 4, 5, 5)], [torch.randn(8, 4, 3, 3)])
    weight = torch.randn(8, 4, 3, 3)
    row = plain.run.storage.bind([weight])
    assert plain.run.storage.nbytes(row) >= weight.numel() * 4
    last = weight.contiguous(memory_format=torch.channels_last)
    adopted = batched(lambda x, w: F.conv2d(x, w), [torch.randn(1, 4, 5, 5)], [last])
    row = adopted.run.storage.bind([last])
    assert adopted.run.storage.nbytes(row) < 256

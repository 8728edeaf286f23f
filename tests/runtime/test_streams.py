"""Streams that nobody else of the runtime is given."""

from __future__ import annotations

import gc
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from torch_mux import compat
from torch_mux.runtime import lanes


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The streams made so far; each number is one."""
    numbers, found = count(1), []

    def make(device: torch.device, priority: int) -> Any:
        found.append(next(numbers))
        return SimpleNamespace(cuda_stream=found[-1])

    monkeypatch.setattr(compat, "own_stream", make)
    monkeypatch.setattr(lanes, "_returned", type(lanes._returned)(lanes._returned.default_factory))
    return found


def test_holders_never_share_a_stream_and_one_that_came_back_is_lent_again(made: list[int]) -> None:
    device = torch.device("cuda:0")
    sides = [lanes.Side(device) for _ in range(100)]
    assert len({side.address for side in sides}) == 100
    freed = {side.address for side in sides[60:]}
    del sides[60:]
    gc.collect()
    again = [lanes.Side(device) for _ in range(41)]
    assert freed < {side.address for side in again}
    assert len({side.address for side in sides + again}) == 101 == len(made)


def test_a_stream_comes_back_to_holders_of_its_kind_only(made: list[int]) -> None:
    device = torch.device("cuda:0")
    urgent = lanes.Side(device, -5).address
    gc.collect()
    assert lanes.Side(device).address != urgent
    assert lanes.Side(torch.device("cuda:1"), -5).address != urgent
    assert lanes.Side(device, -5).address == urgent


@pytest.mark.gpu
def test_lanes_and_captures_never_share_one() -> None:
    device = torch.device("cuda:0")
    lane = lanes.Lane(0, device)
    sides = [lanes.Side(device) for _ in range(70)]
    users = {torch.cuda.Stream(device).cuda_stream for _ in range(64)}
    addresses = {side.address for side in sides} | {lane.address}
    assert len(addresses) == 71 and not addresses & users
    urgent = lanes.Side(device, lanes.highest_priority())
    assert urgent.stream.priority == lanes.highest_priority()
    with torch.cuda.stream(urgent.stream):
        assert torch.ones(3, device=device).sum().item() == 3.0

"""Streams that nobody else of the runtime is given."""

from __future__ import annotations

import logging
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from torch_mux.runtime import lanes


def pool(size: int) -> Any:
    """Hands out so many streams in turn, as torch does."""
    numbers = cycle(range(size))
    return lambda: SimpleNamespace(cuda_stream=next(numbers))


def test_a_stream_that_comes_round_again_is_passed_over() -> None:
    draw = pool(4)
    first = lanes.apart(draw, set())
    taken = {first.cuda_stream}
    for _ in range(20):
        assert lanes.apart(draw, taken).cuda_stream not in taken


def test_more_holders_than_streams_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert lanes.apart(pool(2), {0, 1}).cuda_stream in (0, 1)
    assert "streams are in use" in caplog.text


@pytest.mark.gpu
def test_lanes_and_captures_never_share_one() -> None:
    device = torch.device("cuda:0")
    lane = lanes.Lane(0, device)
    sides = []
    for _ in range(40):
        sides.append(lanes.Side(device))
        assert sides[-1].address != lane.address
        sides = sides[-2:]
        assert len({side.address for side in sides}) == len(sides)

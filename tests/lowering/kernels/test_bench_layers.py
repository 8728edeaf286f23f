"""The layers that the benchmarks time: each instance by itself does what one launch for all does."""

from __future__ import annotations

import pytest
import torch

from torch_mux.bench.contenders.recording import Rerun
from torch_mux.bench.layer_data import Data
from torch_mux.bench.layer_ways import SERIAL, GpuWays
from torch_mux.bench.layers import Layer
from torch_mux.bench.together import _checked

CPU = torch.device("cpu")
LAYERS = (
    Layer("a", "linear", 5, 16, 32, 1, None, "gelu"),
    Layer("a", "3x3 add", 16, 8, 9 * 16, 1, (16, 4, 3, 1, 1), "relu", True),
    Layer("a", "1x1 s2", 4, 24, 16, 1, (16, 4, 1, 2, 0)),
    Layer("a", "3x3 each", 16, 16, 9, 1, (16, 4, 3, 1, 1), "hardswish"),
    Layer("a", "5x5 each s2", 4, 16, 25, 1, (16, 4, 5, 2, 2), "relu"),
)


@pytest.mark.interpreter
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_every_way_is_right_and_ours_have_equal_bits(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_mux.bench.layer_ways.cold_sets", lambda layer, slots, most: 3)
    ways = GpuWays(layer, 3, Rerun(), CPU)
    own = None
    for name, kind in ways.names().items():
        way = ways.make(name)
        assert way.kind == kind and way.rounds == 3
        assert _checked(way, ways.data.exact(3, way.plain), own) < 2e-3
        if name == SERIAL[1]:
            own = way.found
    assert own is not None and own.shape[:2] == (3, 3)


@pytest.mark.interpreter
def test_weights_of_another_instance_are_noticed() -> None:
    ways = GpuWays(LAYERS[0], 2, Rerun(), CPU)
    ways.data.table.copy_(ways.data.table.view(-1, 2).flip(1).view(-1, 1))
    with pytest.raises(RuntimeError, match="relative l2 error"):
        _checked(ways.make(SERIAL[1]), ways.data.exact(2), None)


def test_an_instance_is_the_same_whatever_their_number() -> None:
    few, many = (Data(LAYERS[1], count, 3, CPU) for count in (2, 4))
    assert torch.equal(few.x, many.x[:2]) and torch.equal(few.exact(2), many.exact(2))
    assert torch.equal(few.weights[2:4], many.weights[4:6]), "sets are copies"

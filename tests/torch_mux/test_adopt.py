"""adopt: weights re-strided in place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torch_mux
from torch_mux import state
from torch_mux.errors import NotCompiled


@torch.inference_mode()
def test_adopt_restrides_in_place_and_keeps_values() -> None:
    with torch.inference_mode(False):
        model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)).eval()
        compiled = torch.compile(model, backend="mux", dynamic=False)
    weight, before = model[0].weight, model[0].weight.detach().clone()
    x = torch.randn(1, 8, 6, 6)
    want = torch_mux.gather((compiled, x))[0]
    assert torch_mux.adopt(compiled) == 1  # a 1x1 weight is channels-last already
    assert model[0].weight is weight and torch.equal(weight, before)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert torch_mux.adopt(model) == 0
    torch.testing.assert_close(torch_mux.gather((compiled, x))[0], want)
    with pytest.raises(NotCompiled):
        torch_mux.adopt(len)


def test_an_adopted_model_needs_no_copies() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(2), nn.Conv1d(8, 6, 3)
    ).eval()
    compiled = torch.compile(model, backend="mux", dynamic=False)
    x = torch.randn(1, 4, 8, 8)

    def copied() -> list[int]:
        found = state.engine()._instances()
        return [each.served.storage._rows[each.row].copied for each in found if each.row is not None]

    with torch.inference_mode():
        want = model(x)
        torch.testing.assert_close(torch_mux.gather((compiled, x))[0], want)
        assert min(copied()) > 0
        assert torch_mux.adopt(compiled) == 3
        torch.testing.assert_close(torch_mux.gather((compiled, x))[0], want)
        assert 0 in copied()
        assert torch_mux.adopt(compiled) == 0

"""Learned calls notice what appears after they were learned, and modules that lie outside of the tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_mux
from torch_mux.calls import prepare


class Config:
    """Computes ``scale`` once ``_scale`` is there."""

    @property
    def computed(self) -> float:
        return self._scale  # type: ignore[attr-defined, no-any-return]


class Net(nn.Module):
    def __init__(self, body: Callable[..., Tensor]) -> None:
        super().__init__()
        self.line, self.body, self.config = nn.Linear(4, 4), body, Config()
        self.loose = (nn.Linear(4, 4),)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, self.line(x))


def _has(self: Any, y: Tensor) -> Tensor:
    return y * 3 if hasattr(self.config, "scale") else y


def _default(self: Any, y: Tensor) -> Tensor:
    return y if getattr(self.config, "scale", None) is None else y * 3


def _own(self: Any, y: Tensor) -> Tensor:
    return y * 3 if hasattr(self, "scale") else y


def _computed(self: Any, y: Tensor) -> Tensor:
    return y * 3 if hasattr(self.config, "computed") else y


def _loose(self: Any, y: Tensor) -> Tensor:
    return self.loose[0](y)  # type: ignore[no-any-return]


def _on_config(net: Any) -> None:
    net.config.scale = 1


def _on_self(net: Any) -> None:
    net.scale = 1


def _behind_a_property(net: Any) -> None:
    net.config._scale = 1.0


def _another_weight(net: Any) -> None:
    net.loose[0].weight = nn.Parameter(torch.randn(4, 4))


@pytest.mark.parametrize(
    ("body", "change"),
    [
        (_has, _on_config),
        (_default, _on_config),
        (_own, _on_self),
        (_computed, _behind_a_property),
        (_loose, _another_weight),
    ],
)
def test_a_change_is_noticed(body: Callable[..., Tensor], change: Callable[[Any], None]) -> None:
    net, x = Net(body).eval(), torch.randn(2, 4)
    model = torch.compile(net, backend="mux", dynamic=False)
    with torch.inference_mode():
        for _ in range(2):
            torch.testing.assert_close(torch_mux.gather((model, x))[0], net(x))
        assert prepare(model, (x,), {}).route is not None, torch_mux.explain()
        change(net)
        for _ in range(2):
            torch.testing.assert_close(torch_mux.gather((model, x))[0], net(x))

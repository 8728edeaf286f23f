"""Guards as source expressions: every spelling that torch uses for an attribute or an item is watched."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from torch_mux.recording import Frame
from torch_mux.watching import Reached, Unwatchable, watches


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(width=3, names={"a": 1}, sizes=[4, 5])

    def forward(self, x: Any) -> Any:
        return x


def reach(model: Net, *guards: str) -> Reached:
    frame = Frame(code=Net.forward.__code__, values={"self": model}, namespace={}, callers=())
    return watches(guards, frame, [])


@pytest.mark.parametrize(
    "guard",
    [
        "L['self'].config.width",
        "getattr(L['self'].config, 'width')",
        "object.__getattribute__(L['self'].config, 'width')",
        "object.__getattribute__(L['self'].config, '__dict__')['width']",
        "dict.__getitem__(L['self'].config.__dict__, 'width')",
    ],
)
def test_every_spelling_of_an_attribute_is_watched(guard: str) -> None:
    model = Net()
    reached = reach(model, guard)
    assert reached.watches.unchanged()
    model.config.width = 4
    assert not reached.watches.unchanged()


@pytest.mark.parametrize(
    "guard", ["L['self'].config.sizes[1]", "list.__getitem__(L['self'].config.sizes, 1)"]
)
def test_every_spelling_of_an_item_is_watched(guard: str) -> None:
    model = Net()
    reached = reach(model, guard)
    assert reached.watches.unchanged()
    model.config.sizes[1] = 6
    assert not reached.watches.unchanged()


def test_a_grown_attribute_dict_is_seen() -> None:
    model = Net()
    reached = reach(model, "object.__getattribute__(L['self'].config, '__dict__')")
    model.config.depth = 2
    assert not reached.watches.unchanged()


@pytest.mark.parametrize("guard", ["sorted(L['self'].config.sizes, 1)", "L['self'].config.sizes[L['x']]"])
def test_what_is_computed_is_refused(guard: str) -> None:
    with pytest.raises(Unwatchable, match="depends on"):
        reach(Net(), guard)

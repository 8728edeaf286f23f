"""Guards as source expressions: every spelling that torch uses for an attribute or an item is watched."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from torch_mux.guard_sources import _parsed, steps_of
from torch_mux.recording import Frame
from torch_mux.watching import Reached, Structure, Unwatchable, watches


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


NTH = "list(dict.keys(L['self'].config.names))[0]"


@pytest.mark.parametrize(
    "guard", [NTH, f"L['self'].config.names[{NTH}]", f"dict.__getitem__(L['self'].config.names, {NTH})"]
)
def test_a_key_by_its_place_is_watched(guard: str) -> None:
    model = Net()
    reached = reach(model, guard)
    model.config.names["b"] = 2  # behind it
    assert reached.watches.unchanged()
    model.config.names["a"] = 3
    assert reached.watches.unchanged() == (guard == NTH)
    del model.config.names["a"]
    assert not reached.watches.unchanged()


def test_a_key_that_is_not_there_is_refused() -> None:
    with pytest.raises(Unwatchable, match="depends on"):
        reach(Net(), "list(dict.keys(L['self'].config.names))[1]")


@pytest.mark.parametrize("guard", ["sorted(L['self'].config.sizes, 1)", "L['self'].config.sizes[L['x']]"])
def test_what_is_computed_is_refused(guard: str) -> None:
    with pytest.raises(Unwatchable, match="depends on"):
        reach(Net(), guard)


@pytest.mark.parametrize(
    "guard",
    [
        "L['self'].config.depth",
        "object.__getattribute__(L['self'].config, 'depth')",
        "hasattr(L['self'].config, 'depth')",
    ],
)
def test_an_absent_attribute_has_to_stay_absent(guard: str) -> None:
    model = Net()
    reached = reach(model, guard)
    assert reached.watches.unchanged()
    model.config.depth = None
    assert not reached.watches.unchanged()


def test_what_an_absent_attribute_would_hold_is_refused() -> None:
    with pytest.raises(Unwatchable, match="depends on"):
        reach(Net(), "L['self'].config.depth.inner")


def test_a_buffer_named_as_an_attribute_belongs_to_the_structure() -> None:
    model = Net()
    model.register_buffer("position", torch.arange(3), persistent=False)
    reached = reach(model, "L['self'].position")
    assert reached.watches.unchanged()
    structure = Structure.of(reached.roots, reached.flags)
    assert structure.unchanged()
    model.position = torch.arange(3)
    assert not structure.unchanged()


def test_a_tensor_that_is_no_buffer_is_refused() -> None:
    model = Net()
    model.table = torch.arange(3)
    with pytest.raises(Unwatchable, match="neither argument, parameter nor buffer"):
        reach(model, "L['self'].table")


@pytest.mark.parametrize(
    "name",
    [
        "L['self']",
        "L['self'].cfg['k']",
        "L['self']._modules['layer1']._modules['0'].conv1.weight",
        "G['table'][0].a_1['two words'][12]",
        "L['x'].__dict__['é']",
        'L["self"].a',
        "L['self'].a[-1]",
        "L['it\\'s'].a",
        "L['self'].a[b'k']",
        "L['self'].a[007]",
        "L['self'].f().a",
        "getattr(L['self'].a, 'b').c",
        "list(dict.keys(L['self'].d))[0]",
        "type(L['self'].a)",
        "L['self'] .a",
        "L.self",
        "M['self'].a",
    ],
)
def test_plain_sources_mean_what_python_reads(name: str) -> None:
    def read(how: Callable[[str], object]) -> object:
        try:
            return how(name)
        except Unwatchable as error:
            return str(error)

    assert read(steps_of) == read(_parsed)

"""State that a call sets and undoes is left out of learned calls; state that it changes is not."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_mux.bytecode import rests
from torch_mux.learned import Lesson, learn
from torch_mux.replay import Refusal
from torch_mux.routes import Route, arrange
from torch_mux.types import Quota

DEPTH = 0
MODE = "idle"
CALLS = 0
STACK: list[str] = ["bottom"]
TABLE: dict[str, int] = {"a": 1}
SEEN: list[Any] = []


class Place:
    """Module-level state, as libraries keep it."""

    def __init__(self) -> None:
        self.scale, self.depth, self.inner = 0.5, 0, {"k": 1}


PLACE = Place()


@dataclass
class Bag:
    """Something that a call makes, fills and throws away."""

    total: int = 0


class Net(nn.Module):
    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.fc, self.body, self.state, self.name = nn.Linear(4, 4), body, "idle", "net"

    def forward(self, x: Tensor, **options: Any) -> Any:
        return self.body(self, x, **options)


def lesson(body: Callable[..., Any], fake: Any, **options: Any) -> tuple[Any, Lesson]:
    model, x = torch.compile(Net(body).eval(), backend=fake), torch.randn(2, 4)
    with torch.no_grad():
        return model, learn(model, (x,), options, arrange((x,), options))


def answer(route: Route, x: Tensor, **options: Any) -> Any:
    arranged = arrange((x,), options)
    assert route.matches(arranged) and route.holds()
    request = route.engine.submit(route.instance, route.fill(arranged.leaves), Quota())
    return route.finish(request.result(), arranged.leaves)


def a_global(self: Net, x: Tensor) -> Tensor:
    global MODE
    before, MODE = MODE, "busy"
    y: Tensor = self.fc(x)
    MODE = before
    return y


def a_number(self: Net, x: Tensor) -> Tensor:
    before = PLACE.scale
    PLACE.scale = 2.0
    y: Tensor = self.fc(x) * PLACE.scale
    PLACE.scale = before
    return y


def in_and_out(self: Net, x: Tensor) -> Tensor:
    PLACE.depth += 1
    try:
        return self.fc(x) * PLACE.depth  # type: ignore[no-any-return]
    finally:
        PLACE.depth -= 1


def of_the_module(self: Net, x: Tensor) -> Tensor:
    self.state = "busy"
    y: Tensor = self.fc(x)
    self.state = "idle"
    return y


def a_stack(self: Net, x: Tensor) -> Tensor:
    STACK.append("top")
    y: Tensor = self.fc(x) * len(STACK)
    STACK.pop()
    return y


def an_entry(self: Net, x: Tensor) -> Tensor:
    TABLE["b"] = 2
    y: Tensor = self.fc(x) * sum(TABLE.values())
    del TABLE["b"]
    return y


def an_item(self: Net, x: Tensor) -> Tensor:
    before = PLACE.inner["k"]
    PLACE.inner["k"] = 7
    y: Tensor = self.fc(x) * PLACE.inner["k"]
    PLACE.inner["k"] = before
    return y


def own_containers(self: Net, x: Tensor) -> Tensor:
    bag, parts = Bag(), []
    for _ in range(2):
        parts.append(self.fc(x))
        bag.total += 1
    return torch.cat(parts) * bag.total


def own_options(self: Net, x: Tensor, **options: Any) -> Tensor:
    options["name"] = self.name
    options.setdefault("scale", 2)
    return self.fc(x) * options.pop("scale")  # type: ignore[no-any-return]


UNDONE = [a_global, a_number, in_and_out, of_the_module, a_stack, an_entry, an_item]


@pytest.mark.parametrize("body", [*UNDONE, own_containers, own_options], ids=lambda body: body.__name__)
def test_what_a_call_undoes_is_left_out(fake: Any, body: Callable[..., Any]) -> None:
    model, found = lesson(body, fake)
    assert found.refusal is None and found.route is not None, found.refusal
    x = torch.randn(2, 4)
    with torch.no_grad():
        assert torch.equal(answer(found.route, x), model(x))
        assert found.route.holds()


def _set(place: str) -> None:
    global MODE
    if place == "a_global":
        MODE = "other"
    elif place == "a_number":
        PLACE.scale = 0.25
    elif place == "in_and_out":
        PLACE.depth = 3
    elif place == "a_stack":
        STACK.append("more")
    elif place == "an_entry":
        TABLE["c"] = 3
    elif place == "an_item":
        PLACE.inner["k"] = 3


@pytest.fixture(autouse=True)
def state() -> None:
    global MODE, CALLS
    MODE, CALLS = "idle", 0
    STACK[:], SEEN[:] = ["bottom"], []
    TABLE.clear()
    TABLE["a"] = 1
    PLACE.__init__()  # type: ignore[misc]


@pytest.mark.parametrize("body", UNDONE, ids=lambda body: body.__name__)
def test_another_state_between_calls_is_noticed(fake: Any, body: Callable[..., Any]) -> None:
    model, found = lesson(body, fake)
    assert found.route is not None and found.route.holds()
    if body is of_the_module:
        model._orig_mod.state = "other"
    _set(body.__name__)
    assert not found.route.holds()


def _count(self: Net, x: Tensor) -> Tensor:
    global CALLS
    CALLS += 1
    return self.fc(x)  # type: ignore[no-any-return]


def _leave(self: Net, x: Tensor) -> Tensor:
    PLACE.depth += 1
    return self.fc(x)  # type: ignore[no-any-return]


def _push(self: Net, x: Tensor) -> Tensor:
    STACK.append("top")
    return self.fc(x)  # type: ignore[no-any-return]


def _swap(self: Net, x: Tensor) -> Tensor:
    TABLE.pop("a")
    TABLE["b"] = 1
    return self.fc(x)  # type: ignore[no-any-return]


def _move(self: Net, x: Tensor) -> Tensor:
    TABLE["a"] = TABLE.pop("a")
    TABLE["z"] = 0
    return self.fc(x)  # type: ignore[no-any-return]


def _empty(self: Net, x: Tensor) -> Tensor:
    TABLE.clear()
    return self.fc(x)  # type: ignore[no-any-return]


def _keep(self: Net, x: Tensor) -> Tensor:
    y: Tensor = self.fc(x)
    SEEN.append(y)
    return y


def _hang(self: Net, x: Tensor) -> Tensor:
    y: Tensor = self.fc(x)
    PLACE.last = y  # type: ignore[attr-defined]
    return y


def _hold(self: Net, x: Tensor, **options: Any) -> Tensor:
    PLACE.options = options  # type: ignore[attr-defined]
    return self.fc(x)  # type: ignore[no-any-return]


def _fill(self: Net, x: Tensor, **options: Any) -> Tensor:
    options["cache"]["y"] = 1
    return self.fc(x)  # type: ignore[no-any-return]


def _delete(self: Net, x: Tensor) -> Tensor:
    del PLACE.depth
    return self.fc(x)  # type: ignore[no-any-return]


KEPT = [_count, _leave, _push, _swap, _move, _empty, _keep, _hang, _hold, _delete]


@pytest.mark.parametrize("body", KEPT, ids=lambda body: body.__name__)
def test_what_a_call_changes_is_refused(fake: Any, body: Callable[..., Any]) -> None:
    _, found = lesson(body, fake)
    assert found.route is None and found.refusal is not None
    assert re.search("side effect|after its graph", found.refusal.detail), found.refusal


def test_an_argument_that_the_call_fills_is_refused(fake: Any) -> None:
    _, found = lesson(_fill, fake, cache={"x": 0})
    assert found.route is None and found.refusal is not None


def test_a_hook_that_the_call_registers_and_removes(fake: Any) -> None:
    """Right either way; a graph break keeps it guarded."""

    def body(self: Net, x: Tensor) -> Tensor:
        handle = self.fc.register_forward_hook(lambda module, args, output: output * 2)
        y: Tensor = self.fc(x)
        handle.remove()
        return y

    model, found = lesson(body, fake)
    x = torch.randn(2, 4)
    with torch.no_grad():
        torch.testing.assert_close(model(x), 2 * model._orig_mod.fc(x))
        if found.route is not None:
            torch.testing.assert_close(answer(found.route, x), 2 * model._orig_mod.fc(x))
        else:
            assert found.refusal is not None


def test_a_returned_attribute_is_watched(fake: Any) -> None:
    model, found = lesson(lambda self, x: (self.fc(x), self.name), fake)
    assert found.route is not None, found.refusal
    assert found.route.holds()
    model._orig_mod.name = "renamed"
    assert not found.route.holds()


def test_a_result_has_all_that_its_class_gave_it(fake: Any) -> None:
    model, found = lesson(_annotated, fake)
    assert found.route is not None, found.refusal
    x = torch.randn(2, 4)
    with torch.no_grad():
        got, want = answer(found.route, x), model(x)
    assert type(got) is Tagged and got.tag == want.tag == "made" and torch.equal(got["y"], want["y"])


def test_an_argument_that_comes_back_is_the_very_object_or_guarded(fake: Any) -> None:
    given = {"x": torch.randn(2, 4)}
    _, found = lesson(lambda self, x, **options: (self.fc(x), options["given"]), fake, given=given)
    assert found.route is None and found.refusal is not None
    assert found.result[1] is given


class Tagged(dict):  # type: ignore[type-arg]
    """A dict with an attribute besides its items."""

    tag = "none"


def _annotated(self: Net, x: Tensor) -> Tagged:
    made = Tagged(y=self.fc(x))
    made.tag = "made"
    return made


def __compiled_fn_plain(*args: Any) -> tuple[Any, ...]:
    """Stands for a graph in a frame that this Python compiled by itself."""
    return args


def _returns(x: Any, **options: Any) -> Any:
    out = __compiled_fn_plain(x, x)
    made = dict.__new__(Tagged)
    options.update({"name": PLACE.depth})
    kind = type(made).__mro__[1]
    kind.clear(made)
    for key, value in {"y": out[0]}.items():
        kind.__setitem__(made, key, value)
    PLACE.depth = 0
    TABLE.clear()
    TABLE.update({"a": 1})
    one, other = out
    return [one, (1, made), {"a": other, "b": 2}, Bag(total=3), (*out, None)]


def _prints(x: Any, **options: Any) -> Any:
    out = __compiled_fn_plain(x)
    print(out)
    return out


def _appends(x: Any, **options: Any) -> Any:
    out = __compiled_fn_plain(x)
    for value in out:
        STACK.append(value)
    return out


def test_reads_the_bytecode_of_this_python() -> None:
    values = {"x": torch.ones(1), "options": {}}
    found = rests(_returns.__code__, values, globals())
    written = [(key, value) for _, holder, key, value in found if holder is TABLE or key == "depth"]
    assert ("depth", 0) in written and ("a", 1) in written
    for refused in (_prints, _appends):
        with pytest.raises(Refusal, match="after its graph"):
            rests(refused.__code__, values, globals())

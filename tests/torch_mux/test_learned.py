"""The learned path: what it accepts, what it refuses, what it notices afterwards."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torch_mux import compat
from torch_mux.learned import Lesson, learn
from torch_mux.routes import Route, RouteTable, arrange, table_of
from torch_mux.types import FallbackKind, Quota

SCALE, TABLE = 2, torch.ones(4)


class Net(nn.Module):
    """A module whose forward is given by the test."""

    def __init__(self, body: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("seen", torch.zeros(4))
        self.config = {"k": 2, "names": ["a", "b"]}
        self.alpha = 2.0
        self.count = 0
        self.log: list[int] = []
        self.body = body

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.body is None:
            return self.norm(self.fc(x)).relu()
        return self.body(self, x, *args, **kwargs)


def lesson(model: Any, *args: Any, **kwargs: Any) -> Lesson:
    with torch.no_grad():
        return learn(model, args, kwargs, arrange(args, kwargs))


def route_of(model: Any, *args: Any, **kwargs: Any) -> Route:
    found = lesson(model, *args, **kwargs)
    assert found.refusal is None and found.route is not None, found.refusal
    return found.route


def through(route: Route, *args: Any, **kwargs: Any) -> Any:
    """The result of one learned call."""
    with torch.no_grad():
        arranged = arrange(args, kwargs)
        assert route.matches(arranged) and route.holds()
        return route.finish(
            route.engine.submit(route.instance, route.fill(arranged.leaves), Quota()).result(),
            arranged.leaves,
        )


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


ACCEPTED: dict[str, Callable[..., Any]] = {
    "tensor": lambda self, x: self.fc(x),
    "tuple": lambda self, x: (self.fc(x), self.norm(x)),
    "list": lambda self, x: [self.fc(x), self.norm(x)],
    "dict": lambda self, x: {"y": self.fc(x), "x": x},
    "named tuple": lambda self, x: Pair(self.fc(x), self.norm(x)),
    "nested": lambda self, x: {"y": [self.fc(x), (self.norm(x), None)]},
    "constants": lambda self, x: (self.fc(x), None, 3, "name", True),
    "twice the same": lambda self, x: (lambda y: (y, y))(self.fc(x)),
    "a size": lambda self, x: (self.fc(x), x.shape[0]),
    "an attribute": lambda self, x: self.fc(x) * self.alpha,
    "a container": lambda self, x: self.fc(x) * self.config["k"],
    "a global": lambda self, x: self.fc(x) * SCALE,
    "a loop over a list": lambda self, x: sum(self.fc(x) for _ in self.config["names"]),
}


@pytest.mark.parametrize("body", ACCEPTED.values(), ids=ACCEPTED)
def test_accepts(fake: Any, body: Callable[..., Any]) -> None:
    model = torch.compile(Net(body).eval(), backend=fake)
    route = route_of(model, torch.randn(3, 4))
    before = fake.runs
    x = torch.randn(3, 4)
    got = through(route, x)
    assert fake.runs == before and len(fake.engine.submitted) == 1
    with torch.no_grad():
        want = model(x)
    assert type(got) is type(want)
    assert pytree.tree_structure(got) == pytree.tree_structure(want)
    for one, other in zip(pytree.tree_leaves(got), pytree.tree_leaves(want)):
        assert torch.equal(one, other) if isinstance(other, Tensor) else one == other


def test_returns_the_result_of_the_one_real_call(fake: Any) -> None:
    model = torch.compile(Net().eval(), backend=fake)
    x = torch.randn(3, 4)
    found = lesson(model, x)
    assert fake.runs == 1 and found.calls == 1
    with torch.no_grad():
        torch.testing.assert_close(found.result, model(x))


def test_accepts_keywords_and_nested_arguments(fake: Any) -> None:
    model = torch.compile(
        Net(lambda self, x, pair, *, flag: self.fc(x) + pair["a"][0] * flag).eval(), backend=fake
    )
    x, extra = torch.randn(2, 4), torch.randn(2, 4)
    route = route_of(model, x, {"a": [extra]}, flag=2)
    y, other = torch.randn(2, 4), torch.randn(2, 4)
    with torch.no_grad():
        assert torch.equal(through(route, y, {"a": [other]}, flag=2), model(y, {"a": [other]}, flag=2))
        assert arrange((y, {"a": [other]}), {"flag": 3}).key != arrange((y, {"a": [other]}), {"flag": 2}).key
        assert not route.matches(arrange((y, {"b": [other]}), {"flag": 2}))


def test_accepts_a_top_level_torch_module_and_a_function(fake: Any) -> None:
    stack = torch.compile(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), backend=fake)
    inner = nn.Linear(4, 4)
    function = torch.compile(lambda x: inner(x).relu(), backend=fake)
    for model in (stack, function):
        route, x = route_of(model, torch.randn(2, 4)), torch.randn(2, 4)
        with torch.no_grad():
            assert torch.equal(through(route, x), model(x))


@torch._dynamo.config.patch(automatic_dynamic_shapes=True)  # other tests' threads may lose it on torch 2.11
def test_a_symbolic_size_is_a_constant_of_its_signature(fake: Any) -> None:
    model = torch.compile(Net().eval(), backend=fake)
    routes = [route_of(model, torch.randn(size, 4)) for size in (2, 3, 5)]
    assert any(not leaf for leaf, _ in routes[-1].inputs)
    x, y = torch.randn(5, 4), torch.randn(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(through(routes[-1], x), model(x))
    assert not routes[-1].matches(arrange((y,), {}))


def test_a_repeated_argument_is_part_of_the_signature(fake: Any) -> None:
    model = torch.compile(Net(lambda self, x, y: self.fc(x) + 2 * y).eval(), backend=fake)
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    route = route_of(model, x, x)
    with torch.no_grad():
        assert not route.matches(arrange((x, y), {}))
    assert through(route, y, y) is not None


def _count(self: Net, x: Tensor) -> Tensor:
    self.count += 1
    return self.fc(x)


def _append(self: Net, x: Tensor) -> Tensor:
    self.log.append(1)
    return self.fc(x)


def _write_item(self: Net, x: Tensor) -> Tensor:
    self.config["k"] = 5
    return self.fc(x)


def _rebind_buffer(self: Net, x: Tensor) -> Tensor:
    self.seen = self.seen + 1
    return self.fc(x)


def _write_buffer(self: Net, x: Tensor) -> Tensor:
    self.seen.add_(1)
    return self.fc(x)


def _write_argument(self: Net, x: Tensor) -> Tensor:
    x.add_(1)
    return self.fc(x)


def _graph_break(self: Net, x: Tensor) -> Tensor:
    y = self.fc(x)
    torch._dynamo.graph_break()
    return y.relu()


def _item(self: Net, x: Tensor) -> Tensor:
    y = self.fc(x)
    return y * 2 if y.sum().item() > 0 else y


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "graph break": (_graph_break, "graph"),
    "item": (_item, "graph"),
    "counter": (_count, "side effect"),
    "list append": (_append, "after its graph|side effect"),
    "dict write": (_write_item, "after its graph|side effect"),
    "rebound buffer": (_rebind_buffer, "side effect"),
    "written buffer": (_write_buffer, "side effect"),
    "written argument": (_write_argument, "side effect"),
    "global tensor": (lambda self, x: self.fc(x) + TABLE, "tensor"),
    "returned parameter": (lambda self, x: (self.fc(x), self.fc.weight), "after its graph|parameter"),
    "returned view of an argument": (lambda self, x: (self.fc(x), x.view(-1)), "view|after its graph"),
}


@pytest.mark.parametrize(("body", "reason"), REFUSED.values(), ids=REFUSED)
def test_refuses(fake: Any, body: Callable[..., Any], reason: str) -> None:
    found = lesson(torch.compile(Net(body).eval(), backend=fake), torch.randn(2, 4))
    assert found.route is None and found.refusal is not None
    assert found.refusal.kind is FallbackKind.GUARDED and found.refusal.target == "Net"
    assert re.search(reason, found.refusal.detail), found.refusal.detail


def test_refuses_batch_norm_in_training(fake: Any) -> None:
    found = lesson(torch.compile(Net(), backend=fake), torch.randn(2, 4))
    assert found.refusal is not None and "side effect" in found.refusal.detail


def test_refuses_hooks(fake: Any) -> None:
    inner, outer, wrapper = (torch.compile(Net().eval(), backend=fake) for _ in range(3))
    inner._orig_mod.fc.register_forward_hook(lambda *_: None)
    outer._orig_mod.register_forward_hook(lambda *_: None)
    wrapper.register_forward_hook(lambda *_: None)
    for model in (inner, outer, wrapper):
        found = lesson(model, torch.randn(2, 4))
        assert found.refusal is not None and found.route is None


def test_refuses_python_around_the_graph(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = torch.compile(Net().eval(), backend=fake), torch.randn(2, 4)
    own = compat.caller_files()
    assert route_of(model, x) is not None
    monkeypatch.setattr(compat, "caller_files", lambda: own - {nn.modules.module.__file__})
    found = lesson(model, x)
    assert found.refusal is not None and "Python runs around its graph" in found.refusal.detail


def test_refuses_an_argument_that_is_a_parameter(fake: Any) -> None:
    model = torch.compile(Net(lambda self, x: self.fc(x)).eval(), backend=fake)
    found = lesson(model, model._orig_mod.fc.weight)
    assert found.refusal is not None and "own parameters" in found.refusal.detail


def test_an_argument_of_another_type_has_no_key() -> None:
    assert arrange((torch.ones(2), object()), {}).key is None


def test_refuses_a_call_that_never_reaches_the_backend(fake: Any) -> None:
    with torch.no_grad():
        found = lesson(torch.compile(nn.LSTM(4, 4).eval(), backend=fake), torch.randn(3, 1, 4))
    assert found.calls == 0
    assert found.refusal is not None and found.refusal.kind is FallbackKind.NOT_REACHED


def test_refuses_a_call_with_grad_enabled(fake: Any) -> None:
    model = torch.compile(Net().eval(), backend=fake)
    x = torch.randn(2, 4)
    found = learn(model, (x,), {}, arrange((x,), {}))
    assert found.refusal is not None and found.refusal.kind is FallbackKind.TRAINING


SIGNATURES: dict[str, Callable[[Tensor], tuple[Any, ...]]] = {
    "shape": lambda x: (torch.randn(5, 4),),
    "strides": lambda x: (torch.randn(4, 3).t(),),
    "dtype": lambda x: (x.double(),),
    "device": lambda x: (x.to("meta"),),
    "requires grad": lambda x: (x.clone().requires_grad_(),),
    "one more": lambda x: (x, 1),
}


@pytest.mark.parametrize("change", SIGNATURES.values(), ids=SIGNATURES)
def test_notices_another_signature(fake: Any, change: Callable[[Tensor], tuple[Any, ...]]) -> None:
    table, x = RouteTable(), torch.randn(3, 4)
    route = route_of(torch.compile(Net().eval(), backend=fake), x)
    with torch.no_grad():
        key = arrange((x,), {}).key
        assert key is not None
        table.add(key, route)
        assert table.find(arrange((x,), {})) is route
        assert table.find(arrange(change(x), {})) is None


def test_notices_modes(fake: Any) -> None:
    table, x = RouteTable(), torch.randn(3, 4)
    route = route_of(torch.compile(Net().eval(), backend=fake), x)
    with torch.no_grad():
        key = arrange((x,), {}).key
        assert key is not None
        table.add(key, route)
        with torch.autocast("cpu"):
            assert table.find(arrange((x,), {})) is None
        with torch.device("cpu"):
            assert table.find(arrange((x,), {})) is None
        assert table.find(arrange((x,), {})) is route
    with torch.inference_mode():
        assert table.find(arrange((x,), {})) is None
    assert table.find(arrange((x,), {})) is None


def _rebind(model: Net) -> None:
    model.fc.weight = nn.Parameter(torch.zeros(4, 4))


def _global(model: Net) -> None:
    global SCALE
    SCALE = SCALE + 1


CHANGES: dict[str, tuple[Callable[..., Any] | None, Callable[[Net], Any]]] = {
    "rebound weight": (None, _rebind),
    "assigned state dict": (
        None,
        lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
    ),
    "replaced submodule": (None, lambda model: setattr(model, "fc", nn.Linear(4, 4))),
    "deleted bias": (None, lambda model: setattr(model.fc, "bias", None)),
    "added buffer": (None, lambda model: model.norm.register_buffer("more", torch.ones(1))),
    "train mode": (None, lambda model: model.train()),
    "train mode of a submodule": (None, lambda model: model.norm.train()),
    "submodule hook": (None, lambda model: model.fc.register_forward_hook(lambda *_: None)),
    "attribute": (ACCEPTED["an attribute"], lambda model: setattr(model, "alpha", 3.0)),
    "nested container": (ACCEPTED["a container"], lambda model: model.config.update(k=7)),
    "replaced container": (ACCEPTED["a container"], lambda model: setattr(model, "config", {"k": 9})),
    "grown container": (ACCEPTED["a loop over a list"], lambda model: model.config["names"].append("c")),
    "global": (ACCEPTED["a global"], _global),
}


@pytest.mark.parametrize(("body", "change"), CHANGES.values(), ids=CHANGES)
def test_notices_a_changed_model(
    fake: Any, body: Callable[..., Any] | None, change: Callable[[Net], Any]
) -> None:
    model = torch.compile(Net(body).eval(), backend=fake)
    route = route_of(model, torch.randn(3, 4))
    assert route.holds()
    change(model._orig_mod)
    assert not route.holds()


def test_sees_weights_written_in_place(fake: Any) -> None:
    model = torch.compile(Net().eval(), backend=fake)
    x = torch.randn(3, 4)
    route = route_of(model, x)
    with torch.no_grad():
        model._orig_mod.fc.weight.mul_(3)
        assert torch.equal(through(route, x), model(x))


def test_a_route_does_not_keep_its_model_alive(fake: Any) -> None:
    gc.collect()
    gc.disable()
    try:
        module = Net(ACCEPTED["a container"]).eval()
        model, x = torch.compile(module, backend=fake), torch.randn(3, 4)
        key = arrange((x,), {}).key
        assert key is not None
        table_of(model, 1).add(key, route_of(model, x))
        held = [weakref.ref(module), weakref.ref(module.fc.weight)]
        del module, model
        fake.engine.submitted.clear()
        gc.collect()
        assert [ref() for ref in held][0] is None
    finally:
        gc.enable()


def test_a_table_is_emptied_by_another_epoch_and_not_copied(fake: Any) -> None:
    model = torch.compile(Net().eval(), backend=fake)
    x = torch.randn(3, 4)
    table, key = table_of(model, 1), arrange((x,), {}).key
    assert key is not None
    table.add(key, route_of(model, x))
    assert copy.deepcopy(table).routes == {} and table.routes
    assert table_of(model, 1) is table and table.routes
    assert table_of(model, 2) is table and not table.routes


def test_notices_a_rebound_parameter_of_one_element_and_equal_value(fake: Any) -> None:
    class Scaled(Net):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Any:
            return self.fc(x) * self.gain

    model = torch.compile(Scaled().eval(), backend=fake)
    route = route_of(model, torch.randn(3, 4))
    assert route.holds()
    model._orig_mod.gain = nn.Parameter(torch.ones(1))
    assert not route.holds()

"""What users do around a compiled model: hooks, autocast, graph breaks, resets, switching mux off."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_mux
from torch_mux.calls import prepare

WAYS = ("call", "gather", "submit")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu())  # type: ignore[no-any-return]


class Broken(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x).relu()
        torch._dynamo.graph_break()
        return self.two(y)  # type: ignore[no-any-return]


class Optional(Net):
    def forward(self, x: Tensor, scale: Tensor | None = None, *, negate: bool = False) -> dict[str, Any]:
        y = self.two(self.one(x).relu())
        y = y if scale is None else y * scale
        return {"y": -y if negate else y, "scale": scale, "count": 2}


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def compiled(kind: Callable[[], nn.Module] = Net, training: bool = False) -> Any:
    with torch.inference_mode(False):
        return torch.compile(kind().train(training), backend="mux", dynamic=False)


def ask(way: str, model: Any, x: Tensor) -> Any:
    if way == "gather":
        return torch_mux.gather((model, x))[0]
    if way == "submit":
        return torch_mux.submit(model, x).result(timeout=120)
    return model(x)


def close(one: Tensor, other: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("way", WAYS)
def test_a_hook_added_to_a_submodule_is_honoured(way: str) -> None:
    first, second = compiled(), compiled()
    x, seen = torch.randn(2, 8), []
    for model in (first, second, first, second):
        close(ask(way, model, x), model._orig_mod(x))
    plain = ask(way, second, x)
    handle = second._orig_mod.one.register_forward_hook(lambda module, args, output: output * 3)
    for _ in range(2):
        close(ask(way, second, x), second._orig_mod(x))
        assert not torch.allclose(ask(way, second, x), plain)
        close(ask(way, first, x), first._orig_mod(x))
    handle.remove()
    third = compiled()
    third._orig_mod.one.register_forward_pre_hook(lambda module, args: seen.append(1))
    for _ in range(2):
        close(ask(way, second, x), plain)
        before = len(seen)
        close(ask(way, third, x), third._orig_mod(x))
        assert len(seen) == before + 2  # once by mux, once by eager


def test_both_graphs_of_a_broken_call_go_through_mux() -> None:
    models, x = [compiled(Broken) for _ in range(2)], torch.randn(2, 8)
    for _ in range(2):
        for way in WAYS:
            for model in models:
                close(ask(way, model, x), model._orig_mod(x))
    before = torch_mux.stats().requests
    torch_mux.gather(*[(model, x) for model in models])
    assert torch_mux.stats().requests == before + 4
    programs = torch_mux.explain().programs
    assert len(programs) == 2 and all(program.instances == 2 for program in programs)
    assert "Broken: calls stay on the guarded path (graph break" in str(torch_mux.explain())


@pytest.mark.parametrize("way", WAYS)
def test_autocast_around_a_call_is_a_program_of_its_own(way: str) -> None:
    model, x = compiled(), torch.randn(4, 8)
    for _ in range(2):
        close(ask(way, model, x), model._orig_mod(x))
        with torch.autocast("cpu", torch.bfloat16):
            want = model._orig_mod(x)
            got = ask(way, model, x)
        assert got.dtype is want.dtype is torch.bfloat16
        close(got, want, 2e-2)
    assert len(torch_mux.explain().programs) == 2


@pytest.mark.parametrize("learned", [False, True])
def test_keywords_and_what_is_left_out(learned: bool) -> None:
    model, x, scale = compiled(Optional), torch.randn(2, 8), torch.randn(4)
    for keywords in ({}, {"scale": scale}, {"negate": True}, {"scale": scale, "negate": True}):
        want = model._orig_mod(x, **keywords)
        for _ in range(2):
            got = (
                torch_mux.submit(model, x, **keywords).result(timeout=120)
                if learned
                else model(x, **keywords)
            )
            assert list(got) == list(want) and got["scale"] is keywords.get("scale") and got["count"] == 2
            close(got["y"], want["y"])
        if learned:
            assert prepare(model, (x,), dict(keywords)).route is not None


@pytest.mark.parametrize("way", WAYS)
def test_dynamo_reset_in_the_middle_of_serving(way: str) -> None:
    models, x = [compiled() for _ in range(2)], torch.randn(2, 8)
    alone = [ask(way, model, x) for model in models]
    for _ in range(2):
        torch._dynamo.reset()
        for model, want in zip(models, alone):
            for _ in range(2):
                assert torch.equal(ask(way, model, x), want)
    (program,) = torch_mux.explain().programs
    assert program.instances == 2


@pytest.mark.parametrize("way", WAYS)
def test_switched_off_and_on_again_while_it_serves(way: str) -> None:
    model, x = compiled(), torch.randn(2, 8)
    want = ask(way, model, x)
    torch_mux.configure(enabled=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        late = compiled()
        for _ in range(2):
            close(ask(way, model, x), want)
            close(ask(way, late, x), late._orig_mod(x))
    assert "disabled" in str(torch_mux.explain())
    assert len(torch_mux.explain().programs) == 1  # the late one went to Inductor whole
    torch_mux.configure(enabled=True)
    for _ in range(2):
        assert torch.equal(ask(way, model, x), want)
        close(ask(way, late, x), late._orig_mod(x))


@pytest.mark.parametrize("way", WAYS)
def test_train_mode_and_grad_are_named(way: str) -> None:
    model, x = compiled(), torch.randn(2, 8)
    named = pytest.warns(UserWarning, match="Net is in eval mode but grad is enabled")
    with torch.inference_mode(False), torch.enable_grad(), named:
        assert ask(way, model, torch.randn(2, 8)).requires_grad
    training = compiled(Dropping, training=True)
    with pytest.warns(UserWarning, match="Dropping is in train mode.*Dropping.eval()"):
        first = ask(way, training, x)
    assert not torch.equal(first, ask(way, training, x))
    assert "Dropping: it is in train mode" in str(torch_mux.explain())
    training._orig_mod.eval()
    close(ask(way, training, x), training._orig_mod(x))


class Dropping(Net):
    """A model that someone forgot to put into eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.drop(self.one(x)))  # type: ignore[no-any-return]


def test_a_wrapper_in_train_mode_around_a_model_in_eval_mode_is_no_warning() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).eval()
    wrapper = nn.Sequential(model)
    compiled = torch.compile(wrapper, backend="mux")
    x = torch.randn(2, 4)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(compiled(x), model(x))
    assert not torch_mux.explain().notes

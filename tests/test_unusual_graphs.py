"""What first users bring besides floats in and floats out: one named behaviour each, in rounds of two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_mux
from torch_mux.types import FallbackKind

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


class Applied(nn.Module):
    """One linear layer, one buffer, and what a case does with them."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.line = nn.Linear(6, 6)
        self.register_buffer("state", torch.zeros(4, 6))

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def _autocast(self: Any, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        y = self.line(x)
    return y.float().relu() + x  # type: ignore[no-any-return]


#: Name → (function, inputs).
COALESCED: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Tensor, ...]]]] = {
    "no rows": (lambda self, x: self.line(x).relu(), lambda: (torch.randn(0, 6),)),
    "no rows after a slice": (lambda self, x: (self.line(x)[:0], x * 2), lambda: (torch.randn(3, 6),)),
    "integers": (
        lambda self, x: (x * 2 + 1, x.float() @ self.line.weight),
        lambda: (torch.arange(18).view(3, 6),),
    ),
    "booleans": (lambda self, x: (~x, x.float() @ self.line.weight), lambda: (torch.rand(3, 6) > 0.5,)),
    "float64": (lambda self, x: x.cumsum(0) / 3, lambda: (torch.randn(3, 6, dtype=torch.float64),)),
    "scalars": (
        lambda self, x, y: (x * y, self.line.weight * y),
        lambda: (torch.tensor(2.0), torch.tensor(3)),
    ),
    "strided": (lambda self, x: self.line(x).relu(), lambda: (torch.randn(6, 8)[:, ::2].t(),)),
    "expanded": (lambda self, x: self.line(x).relu(), lambda: (torch.randn(1, 6).expand(5, 6),)),
    "autocast": (_autocast, lambda: (torch.randn(3, 6),)),
    "complex": (
        lambda self, x: (x * x, self.line(x.abs())),
        lambda: (torch.randn(3, 6, dtype=torch.cfloat),),
    ),
}


def compiled(function: Callable[..., Any], device: str) -> tuple[list[Any], list[Any]]:
    nets = [Applied(function).eval().to(device) for _ in range(2)]
    return nets, [torch.compile(net, backend="mux", dynamic=False) for net in nets]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", COALESCED)
def test_it_coalesces(case: str, device: str) -> None:
    function, inputs = COALESCED[case]
    nets, models = compiled(function, device)
    with torch.inference_mode():
        given = [tuple(value.to(device) for value in inputs()) for _ in nets]
        for _ in range(2):
            calls = [(model, *values) for model, values in zip(models, given, strict=True)]
            for net, values, answer in zip(nets, given, torch_mux.gather(*calls), strict=True):
                torch.testing.assert_close(answer, net(*values), rtol=2e-3, atol=1e-3)
    (program,) = torch_mux.explain().programs
    assert program.coalesced, torch_mux.explain()


def _cache_slice(self: Any, x: Tensor, cache: Tensor) -> Tensor:
    cache[:, 1] = self.line(x)
    return cache.sum(1)


def _cache_index_copy(self: Any, x: Tensor, cache: Tensor) -> Tensor:
    cache.index_copy_(1, torch.tensor([2], device=x.device), self.line(x).unsqueeze(1))
    return cache.sum(1)


def _copied_into(self: Any, x: Tensor, cache: Tensor) -> Tensor:
    cache.copy_(self.line(x).unsqueeze(1).expand_as(cache))
    return cache * 2


def _buffer(self: Any, x: Tensor, cache: Tensor) -> Tensor:
    self.state.add_(self.line(x))
    return self.state * cache[0, 0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", [_cache_slice, _cache_index_copy, _copied_into, _buffer])
def test_writes_reach_the_caller_once_and_are_named(function: Callable[..., Any], device: str) -> None:
    nets, models = compiled(function, device)
    caches = [torch.randn(4, 3, 6, device=device) for _ in nets]
    expected = [cache.clone() for cache in caches]
    eager = [Applied(function).eval().to(device) for _ in nets]
    for other, net in zip(eager, nets, strict=True):
        other.load_state_dict(net.state_dict())
    with torch.inference_mode():
        for _ in range(3):
            x = torch.randn(4, 6, device=device)
            answers = torch_mux.gather(*[(m, x, cache) for m, cache in zip(models, caches, strict=True)])
            for k, answer in enumerate(answers):
                torch.testing.assert_close(answer, eager[k](x, expected[k]), rtol=1e-3, atol=1e-3)
                torch.testing.assert_close(caches[k], expected[k], rtol=1e-3, atol=1e-3)
                torch.testing.assert_close(nets[k].state, eager[k].state, rtol=1e-3, atol=1e-3)
    (program,) = torch_mux.explain().programs
    assert {reason.kind for reason in program.reasons} == {FallbackKind.MUTATES_INPUT}


@pytest.mark.gpu
def test_several_devices_are_named() -> None:
    nets, models = compiled(lambda self, x, y: self.line(x) + y.to(x.device), "cuda")
    x, y = torch.randn(3, 6, device="cuda"), torch.randn(3, 6)
    with torch.inference_mode():
        torch.testing.assert_close(models[0](x, y), nets[0](x, y), rtol=1e-3, atol=1e-3)
    (program,) = torch_mux.explain().programs
    assert {reason.kind for reason in program.reasons} == {FallbackKind.SUBCLASS}
    assert "spans" in str(torch_mux.explain())


def _raises(model: Any, *inputs: Tensor) -> bool:
    try:
        model(*inputs)
    except RuntimeError:
        return True
    return False


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("entry", ["call", "gather", "submit"])
def test_checks_that_raise_run_and_are_named(entry: str, device: str) -> None:
    """``torch.linalg`` checks its matrices: an effect, which AOTAutograd orders by tokens.

    Torch 2.11's AOTAutograd drops the check for every backend.
    """

    def solve(self: Any, a: Tensor, b: Tensor) -> Tensor:
        return torch.linalg.solve(a, self.line(b))  # type: ignore[no-any-return]

    models = [Applied(solve).eval().to(device) for _ in range(2)]
    compiled: list[Any] = [torch.compile(model, backend="mux") for model in models]
    inputs = [(torch.randn(3, 3, device=device) + 3 * torch.eye(3, device=device),
               torch.randn(3, 6, device=device)) for _ in models]  # fmt: skip

    def ask(round_: list[tuple[Tensor, Tensor]]) -> list[Any]:
        if entry == "gather":
            return list(torch_mux.gather(*[(model, *x) for model, x in zip(compiled, round_)]))
        if entry == "submit":
            futures = [torch_mux.submit(model, *x) for model, x in zip(compiled, round_)]
            return [future.result(timeout=120) for future in futures]
        return [model(*x) for model, x in zip(compiled, round_)]

    with torch.inference_mode():
        for _ in range(2):
            for got, model, x in zip(ask(inputs), models, inputs):
                torch.testing.assert_close(got, model(*x), rtol=1e-3, atol=1e-4)
        singular = (torch.zeros(3, 3, device=device), inputs[0][1])
        checked = _raises(torch.compile(models[0], backend="aot_eager"), *singular)
        if checked:
            with pytest.raises(Exception, match="singular"):
                ask([singular, inputs[1]])
        for got, model, x in zip(ask(inputs), models, inputs):
            torch.testing.assert_close(got, model(*x), rtol=1e-3, atol=1e-4)
    kinds = {reason.kind for program in torch_mux.explain().programs for reason in program.reasons}
    assert (FallbackKind.EFFECT in kinds) == checked

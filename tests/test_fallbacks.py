"""Any model runs; what of it is not coalesced is named in ``explain()``, in words."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_mux
from torch_mux import compat
from torch_mux.types import FallbackKind

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
ENTRIES = ("call", "gather", "submit")


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(6, 6)
        self.register_buffer("count", torch.zeros(()))


class Spectral(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(self.line(x)).abs()


class Writing(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.line(x) + self.count.add_(1) * 0  # type: ignore[no-any-return, operator]


class WritingItsInput(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.line(x.mul_(1))  # type: ignore[no-any-return]


class Breaking(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.line(x)
        torch._dynamo.graph_break()
        return F.relu(y) + 1


class Asking(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.line(x)
        return y + float(x.sum() > 1e9)  # type: ignore[no-any-return]


class Constant(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.line.weight.sum()


CASES: list[tuple[type[Base], FallbackKind | None, list[str]]] = [
    (Spectral, FallbackKind.NO_RULE, ["aten._fft_r2c.default: no batching rule"]),
    (Writing, FallbackKind.MUTATES_INPUT, ["aten.copy_.default: mutates an input, parameter or buffer"]),
    (WritingItsInput, FallbackKind.MUTATES_INPUT, ["side effect: the call wrote an argument"]),
    (Breaking, None, ["Breaking: calls stay on the guarded path (graph break"]),
    (Asking, None, ["Asking: calls stay on the guarded path (graph break"]),
    (Constant, FallbackKind.NO_RULE, ["it has no tensor inputs"]),
]


def ask(entry: str, model: Any, x: Tensor) -> Any:
    with torch.inference_mode():
        if entry == "gather":
            return torch_mux.gather((model, x))[0]
        if entry == "submit":
            return torch_mux.submit(model, x).result(timeout=120)
        return model(x)


def compiled(kind: Callable[[], nn.Module], device: str, dynamic: bool | None = False) -> Any:
    return torch.compile(kind().eval().to(device), backend="mux", dynamic=dynamic)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kind", "reason", "texts"), CASES)
def test_it_runs_and_says_why_it_is_not_coalesced(
    kind: type[Base], reason: FallbackKind | None, texts: list[str], device: str
) -> None:
    model, x = compiled(kind, device), torch.randn(4, 6, device=device)
    with torch.inference_mode():
        expected = model._orig_mod(x)
    for entry in (*ENTRIES, *ENTRIES):
        torch.testing.assert_close(ask(entry, model, x), expected, rtol=1e-3, atol=1e-4)
    programs, text = torch_mux.explain().programs, str(torch_mux.explain())
    kinds = {found.kind for program in programs for found in program.reasons}
    assert kinds == (set() if reason is None else {reason})
    assert all(part in text for part in texts), text
    for program in programs:
        assert program.name in (kind.__name__, "forward after a graph break")
        for found in program.reasons:
            assert str(found).count(found.target) == 1, found


class Noisy(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.line(x) * 0 + torch.rand(4, 6, device=x.device)  # type: ignore[no-any-return]


class Dropping(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.line(x) * 0 + 1, 0.5, training=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kind", "values"), [(Noisy, None), (Dropping, {0.0, 2.0})])
def test_random_numbers_are_drawn_anew(kind: type[Base], values: set[float] | None, device: str) -> None:
    model, x = compiled(kind, device), torch.randn(4, 6, device=device)
    answers = [ask(entry, model, x).clone() for entry in (*ENTRIES, *ENTRIES)]
    assert all(not torch.equal(one, other) for one, other in itertools.pairwise(answers))
    for answer in answers:
        assert bool(((answer >= 0) & (answer <= 2)).all())
        assert values is None or set(answer.flatten().tolist()) <= values
    (program,) = torch_mux.explain().programs
    assert program.coalesced and {reason.kind for reason in program.reasons} == {FallbackKind.RANDOM}
    assert "draws random numbers" in str(program)


class Drawing(Base):
    """Every kind of draw, between operations that coalesce."""

    def forward(self, x: Tensor) -> Any:
        y = self.line(x) * 0
        return (
            y + torch.rand(500, 6, device=x.device),
            y + torch.randn_like(y),
            F.dropout(y + 1, 0.25, training=True).relu(),
            torch.bernoulli(y + 0.75),
        )


@pytest.mark.parametrize("device", DEVICES)
def test_draws_have_their_distribution_and_follow_the_seed(device: str) -> None:
    models, x = [compiled(Drawing, device) for _ in range(2)], torch.randn(500, 6, device=device)
    with torch.inference_mode():
        for _ in range(2):
            answers = []
            for _ in range(2):
                torch.manual_seed(7)
                answers.append([*torch_mux.gather((models[0], x), (models[1], x))])
            for one, other in zip(*answers, strict=True):
                assert all(map(torch.equal, one, other))
            for uniform, normal, dropped, coin in answers[0]:
                assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.05
                assert abs(normal.mean()) < 0.1 and abs(normal.std() - 1) < 0.1
                torch.testing.assert_close(dropped.unique(), torch.tensor([0, 4 / 3], device=device))
                assert abs(dropped.mean() - 1) < 0.1 and abs(coin.mean() - 0.75) < 0.05
            assert not any(map(torch.equal, *answers[0]))
    (program,) = torch_mux.explain().programs
    assert program.coalesced and {reason.kind for reason in program.reasons} == {FallbackKind.RANDOM}


@pytest.mark.parametrize("device", DEVICES)
def test_symbolic_sizes(device: str) -> None:
    model = compiled(Spectral, device, dynamic=True)
    for entry in ENTRIES:
        for batch in (2, 3, 5):
            x = torch.randn(batch, 6, device=device)
            with torch.inference_mode():
                expected = model._orig_mod(x)
            torch.testing.assert_close(ask(entry, model, x), expected, rtol=1e-3, atol=1e-4)
    programs = torch_mux.explain().programs
    assert len(programs) == 3 and all(program.coalesced for program in programs)
    assert {reason.kind for program in programs for reason in program.reasons} == {FallbackKind.NO_RULE}
    assert "guarded path" not in str(torch_mux.explain())


def test_what_inductor_does_not_compile_runs_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Callable[..., object]:
        raise RuntimeError("no compiler was found")

    monkeypatch.setattr(compat, "inductor_compile", broken)
    model, x = compiled(lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU()), "cpu"), torch.randn(4, 6)
    with torch.inference_mode():
        expected = model._orig_mod(x)
    for entry in (*ENTRIES, *ENTRIES):
        torch.testing.assert_close(ask(entry, model, x), expected)
    (program,) = torch_mux.explain().programs
    assert not program.coalesced and program.status == "ready"
    assert {reason.kind for reason in program.reasons} == {FallbackKind.COMPILE_FAILED}
    assert "no compiler was found" in str(program) and "operation by operation" in str(program)

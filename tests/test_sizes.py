"""Sizes that change between calls: one model for all of them, coalesced with whoever has the same sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_mux
from torch_mux import state
from torch_mux.lowering import family
from torch_mux.types import FallbackKind

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, stride=2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        y = self.head(F.relu(self.conv(x)).mean((2, 3)))
        return {"y": y.reshape(x.shape[0], -1), "count": x.shape[0], "twice": [2 * x.shape[0]]}


class Encoder(nn.Module):
    """One pre-norm block of attention over a sequence of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 16), nn.Embedding(64, 16)
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length = tokens.shape
        x = self.words(tokens) + self.places(torch.arange(length, device=tokens.device))
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, 2, 8).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(mixed.transpose(1, 2).reshape(batch, length, 16))  # type: ignore[no-any-return]


def two(
    kind: Callable[[], nn.Module], device: str, dynamic: bool | None = None
) -> tuple[list[Any], list[Any]]:
    nets = [kind().eval().to(device) for _ in range(2)]
    return nets, [torch.compile(net, backend="mux", dynamic=dynamic) for net in nets]


def bundles() -> int:
    return sum(program.sizes.get(2, 0) for program in state.engine().plans())


@pytest.mark.parametrize("device", DEVICES)
def test_one_model_for_all_batch_sizes(device: str) -> None:
    nets, models = two(Net, device)
    sizes = (1, 2, 4, 8, 3)
    with torch.inference_mode():
        for count, batch in enumerate(sizes, 1):
            xs = [torch.randn(batch, 3, 9, 9, device=device) for _ in nets]
            alone = [model(x) for model, x in zip(models, xs, strict=True)]
            for _ in range(2):
                before = bundles()
                together = torch_mux.gather(*zip(models, xs, strict=True))
                for net, x, answer, own in zip(nets, xs, together, alone, strict=True):
                    torch.testing.assert_close(answer, net(x), **CLOSE)
                    assert torch.equal(answer["y"], own["y"])
                    assert answer["count"] == batch and type(answer["count"]) is int
            assert bundles() == before + 1, torch_mux.explain()
            assert len(torch_mux.explain().programs) == count
    programs = torch_mux.explain().programs
    assert all(program.coalesced and not program.reasons and program.instances == 2 for program in programs)
    assert "guarded path" not in str(torch_mux.explain())


@pytest.mark.parametrize("device", DEVICES)
def test_sequence_lengths_of_an_encoder(device: str) -> None:
    nets, models = two(Encoder, device, dynamic=True)
    with torch.inference_mode():
        for length in (5, 11, 7, 5):
            xs = [torch.randint(0, 50, (2, length), device=device) for _ in nets]
            together = torch_mux.gather(*zip(models, xs, strict=True))
            for net, model, x, answer in zip(nets, models, xs, together, strict=True):
                torch.testing.assert_close(answer, net(x), **CLOSE)
                assert torch.equal(answer, model(x))
                assert torch.equal(answer, torch_mux.submit(model, x).result(timeout=120))
            assert len(torch_mux.explain().programs) <= 3
        assert bundles() >= 1
    assert all(program.coalesced for program in torch_mux.explain().programs), torch_mux.explain()


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(6, 6)

    def forward(self, x: Tensor, n: int = 1) -> Tensor:
        return self.line(x)[n:].repeat(n, 1)  # type: ignore[no-any-return]


def test_a_family_shares_its_programs_with_models_of_static_sizes() -> None:
    nets = [Line().eval() for _ in range(2)]
    models: list[Any] = [
        torch.compile(net, backend="mux", dynamic=dynamic)
        for net, dynamic in zip(nets, (True, False), strict=True)
    ]
    x = torch.randn(3, 6)
    with torch.inference_mode():
        for net, answer in zip(nets, torch_mux.gather((models[0], x), (models[1], x)), strict=True):
            torch.testing.assert_close(answer, net(x), **CLOSE)
    (program,) = torch_mux.explain().programs
    assert program.instances == 2 and program.coalesced


def test_numbers_are_sizes_too() -> None:
    nets, (model, _) = two(Line, "cpu", dynamic=True)
    with torch.inference_mode():
        for rows, n in ((4, 1), (4, 2), (5, 3), (4, 2)):
            x = torch.randn(rows, 6)
            torch.testing.assert_close(model(x, n), nets[0](x, n), **CLOSE)
            torch.testing.assert_close(torch_mux.gather((model, x, n))[0], nets[0](x, n), **CLOSE)


def test_beyond_the_bound_sizes_run_per_instance_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "MOST_SIZES", 2)
    nets, (model, _) = two(Line, "cpu", dynamic=True)
    with torch.inference_mode():
        for rows in (3, 4, 5, 6, 7, 3, 6):
            x = torch.randn(rows, 6)
            for _ in range(2):
                torch.testing.assert_close(torch_mux.gather((model, x))[0], nets[0](x), **CLOSE)
    first, second, rest = torch_mux.explain().programs
    assert first.coalesced and second.coalesced and not rest.coalesced
    (reason,) = rest.reasons
    assert reason.kind is FallbackKind.DYNAMIC_SHAPE and "more than 2 sets of sizes" in str(reason)
    assert "pad inputs to fewer sizes" in str(torch_mux.explain())


def test_sizes_that_cannot_be_specialised_run_per_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    specialise = family.specialise

    def only_three(module: Any, arguments: Any) -> Any:
        if any(type(argument) is int and argument == 5 for argument in arguments):
            raise family.Unspecialisable("five is right out")
        return specialise(module, arguments)

    monkeypatch.setattr(family, "specialise", only_three)
    nets, (model, _) = two(Line, "cpu", dynamic=True)
    with torch.inference_mode():
        for rows in (3, 5, 3, 5):
            x = torch.randn(rows, 6)
            torch.testing.assert_close(torch_mux.gather((model, x))[0], nets[0](x), **CLOSE)
    three, five = torch_mux.explain().programs
    assert three.coalesced and not five.coalesced and "five is right out" in str(five)


class Filtering(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0].cumsum(0) * 2


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("captured", [False, True])
def test_shapes_that_depend_on_data(captured: bool, dynamic: bool) -> None:
    model: Any = torch.compile(Filtering(), backend="mux", dynamic=dynamic)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=captured), torch.inference_mode():
        for rows in (4, 5, 6):
            x = torch.randn(rows, 6)
            for _ in range(2):
                torch.testing.assert_close(torch_mux.gather((model, x))[0], Filtering()(x))
                torch.testing.assert_close(model(x), Filtering()(x))
    text = str(torch_mux.explain())
    assert ("symbolic or data-dependent shape" if captured else "graph break") in text, text


def test_specialising_is_free_of_the_callers_modes() -> None:
    nets, (model, _) = two(Line, "cpu", dynamic=True)
    x = torch.randn(4, 6)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        for rows in (3, 5):
            x = torch.randn(rows, 6)
            answer = model(x)
            assert answer.dtype == torch.bfloat16
            torch.testing.assert_close(answer, nets[0](x), rtol=3e-2, atol=3e-2)
    with torch.no_grad():
        answer = model(torch.randn(7, 6))
        assert answer.dtype == torch.float32 and not answer.is_inference()

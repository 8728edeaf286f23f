"""Several devices in one process: each model where it is, each round right, mistakes named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_mux
from torch_mux.errors import DeviceMismatch
from torch_mux.types import FallbackKind

pytestmark = pytest.mark.gpu
ENTRIES = ("gather", "submit", "call")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))  # type: ignore[no-any-return]


class Spread(nn.Module):
    """A model that lies on two devices."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16).to("cuda")

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).to("cuda"))  # type: ignore[no-any-return]


def _answers(entry: str, pairs: list[tuple[Any, Tensor]]) -> list[Tensor]:
    if entry == "gather":
        return list(torch_mux.gather(*pairs))
    if entry == "submit":
        return [future.result() for future in [torch_mux.submit(model, x) for model, x in pairs]]
    return [model(x) for model, x in pairs]


def _models(devices: list[str]) -> tuple[list[nn.Module], list[Any], list[Tensor]]:
    plain = [Net().eval().to(device) for device in devices]
    compiled = [torch.compile(model, backend="mux") for model in plain]
    return plain, compiled, [torch.randn(2, 16, device=device) for device in devices]


def _check(devices: list[str], entry: str) -> None:
    plain, compiled, inputs = _models(devices)
    with torch.inference_mode():
        for _ in range(3):
            got = _answers(entry, list(zip(compiled, inputs, strict=True)))
            for answer, model, x in zip(got, plain, inputs, strict=True):
                assert answer.device == x.device
                torch.testing.assert_close(answer, model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("entry", ENTRIES)
def test_models_on_the_cpu_and_on_a_gpu_in_one_round(entry: str) -> None:
    _check(["cpu", "cuda:0", "cpu", "cuda:0"], entry)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("entry", ENTRIES)
def test_models_on_two_gpus_in_one_round(entry: str) -> None:
    _check(["cuda:0", "cuda:1", "cuda:1", "cuda:0"], entry)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_callers_current_device_does_not_matter() -> None:
    with torch.cuda.device(1):
        _check(["cuda:0", "cuda:1"], "gather")
        assert torch.cuda.current_device() == 1


class Relative(nn.Module):
    """A bias by distance, whose distances are made on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.bias = nn.Linear(16, 16), nn.Embedding(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(x.shape[-1])
        distance = (place[:, None] - place[None, :]).abs().to(x.device)
        return self.line(x) @ self.bias(distance)[..., 0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("entry", ENTRIES)
def test_constants_from_the_cpu_do_not_keep_a_model_alone(entry: str) -> None:
    models = [Relative().eval().to("cuda:0") for _ in range(3)]
    compiled = [torch.compile(model, backend="mux") for model in models]
    x = torch.randn(2, 16, device="cuda:0")
    with torch.inference_mode():
        for _ in range(2):
            for got, model in zip(_answers(entry, [(one, x) for one in compiled]), models, strict=True):
                torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            models[1].bias.weight.mul_(2.0)
        (got,) = _answers(entry, [(compiled[1], x)])
        torch.testing.assert_close(got, models[1](x), rtol=1e-4, atol=1e-5)
    (program,) = torch_mux.explain().programs
    assert program.coalesced and not program.reasons


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_model_that_spans_devices_runs_and_says_so(entry: str) -> None:
    model = Spread().eval()
    compiled = torch.compile(model, backend="mux")
    x = torch.randn(2, 16)
    with torch.inference_mode():
        for _ in range(2):
            (got,) = _answers(entry, [(compiled, x)])
            torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)
    reasons = [reason for program in torch_mux.explain().programs for reason in program.reasons]
    assert any(reason.kind is FallbackKind.SUBCLASS and "spans" in reason.detail for reason in reasons)


@pytest.mark.parametrize(
    "ask",
    [
        lambda model, x: torch_mux.gather((model, x)),
        lambda model, x: torch_mux.submit(model, x).result(),
    ],
)
def test_an_input_that_lies_elsewhere_is_named(ask: Callable[[Any, Tensor], object]) -> None:
    _, (compiled,), (x,) = _models(["cuda:0"])
    with torch.inference_mode():
        ask(compiled, x)
        with pytest.raises(DeviceMismatch, match="cpu"):
            ask(compiled, x.cpu())

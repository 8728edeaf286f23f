"""A request's bits do not depend on what shares its bundle, on caps, sizes or entry points."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_mux

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


class Convolutional(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.head = nn.Linear(2 * width, 10)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.head(F.max_pool2d(F.silu(self.down(x)), 2).mean((2, 3)))  # type: ignore[no-any-return]


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, 32)
        self.norm = nn.LayerNorm(32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.query, self.key, self.value = nn.Linear(32, 36), nn.Linear(32, 36), nn.Linear(32, 36)
        self.mixed = nn.Linear(36, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, 4, 8).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, 32))
        q, k, v = (each(x).view(b, n, 3, 12).transpose(1, 2) for each in (self.query, self.key, self.value))
        x = x + self.mixed(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, 36))
        return x + self.down(F.gelu(self.up(x)))  # type: ignore[no-any-return]


class Mobile(nn.Module):
    """An inverted residual with squeeze and excite, between a stem and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.wide, self.wide_norm = nn.Conv2d(8, 20, 1, bias=False), nn.BatchNorm2d(20)
        self.each, self.each_norm = nn.Conv2d(20, 20, 5, padding=2, groups=20, bias=False), nn.BatchNorm2d(20)
        self.squeeze, self.excite = nn.Conv2d(20, 4, 1), nn.Conv2d(4, 20, 1)
        self.narrow = nn.Conv2d(20, 8, 1)
        self.grouped, self.up = nn.Conv2d(8, 12, 3, groups=4), nn.ConvTranspose2d(12, 6, 4, 2, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.stem(x))
        y = F.relu6(self.each_norm(self.each(F.silu(self.wide_norm(self.wide(x))))))
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        x = x + self.narrow(y * gate)
        return self.head(F.relu(self.up(self.grouped(x))).mean((2, 3)))  # type: ignore[no-any-return]


class Mixed(nn.Module):
    """Has a segment that runs per instance."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.volume = nn.Conv3d(1, 1, 3)
        self.last = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.volume(F.relu(self.first(x)).unsqueeze(1)).squeeze(1)
        return self.last(F.hardswish(x).mean((2, 3)))  # type: ignore[no-any-return]


def _cases(device: str) -> list[tuple[Any, Tensor]]:
    """(compiled model, input) for four programs, several instances and two batch sizes each."""
    torch.manual_seed(0)
    dtype = torch.float16 if device == "cuda" else torch.float32
    cases: list[tuple[Any, Tensor]] = []
    for kind in (Convolutional, Attentive, Mobile, Mixed):
        for instance in range(4):
            model = kind().eval().to(device)
            model = model if kind is Attentive and device == "cpu" else model.to(dtype)
            compiled = torch.compile(model, backend="mux", dynamic=False)
            for batch in (1, 3) if instance < 2 else (1,):
                if kind is Attentive:
                    cases.append((compiled, torch.randint(0, 31, (batch, 9), device=device)))
                else:
                    cases.append((compiled, torch.randn(batch, 3, 16, 16, device=device, dtype=dtype)))
    return cases


def _by_entry_point(entry: str, chosen: list[tuple[Any, Tensor]], pool: ThreadPoolExecutor) -> list[Tensor]:
    if entry == "gather":
        return list(torch_mux.gather(*chosen))
    if entry == "submit":
        return [future.result() for future in [torch_mux.submit(model, x) for model, x in chosen]]

    def call(item: tuple[Any, Tensor]) -> Tensor:
        with torch.inference_mode():
            return item[0](item[1])  # type: ignore[no-any-return]

    return list(pool.map(call, chosen))


@pytest.mark.parametrize("device", DEVICES)
def test_same_bits_in_random_bundles(device: str) -> None:
    cases = _cases(device)
    chooser = random.Random(0)
    with torch.inference_mode(), ThreadPoolExecutor(8) as pool:
        alone = [model(x).clone() for model, x in cases]
        for (model, x), expected in zip(cases, alone, strict=True):
            tolerance = 2e-2 if expected.dtype == torch.float16 else 1e-4
            torch.testing.assert_close(expected, model._orig_mod(x), rtol=tolerance, atol=tolerance)
        for _ in range(200):
            chosen = [chooser.randrange(len(cases)) for _ in range(chooser.randint(1, 20))]
            entry = chooser.choice(["gather", "submit", "threads"])
            torch_mux.configure(max_bundle=chooser.choice([1, 3, 8, 64]))
            with torch_mux.quota("tenant", sms=chooser.choice([0.05, 0.3, 1.0])):
                results = _by_entry_point(entry, [cases[k] for k in chosen], pool)
            for k, result in zip(chosen, results, strict=True):
                assert torch.equal(result, alone[k]), (entry, k, chosen)


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


class Activated(nn.Module):
    """A width that no vector divides: ATen takes other code for the last elements than for the first."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.line, self.activation = nn.Linear(6, 13), ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.line(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_same_bits_where_no_vector_divides_the_width(activation: str) -> None:
    torch.manual_seed(0)
    models = [torch.compile(Activated(activation).eval(), backend="mux") for _ in range(5)]
    requests = [(model, torch.randn(1, 6)) for model in models]
    with torch.inference_mode():
        alone = [model(x).clone() for model, x in requests]
        for bundle in (requests, requests[1:4]):
            for answer, expected in zip(torch_mux.gather(*bundle), alone[len(requests) != len(bundle) :]):
                assert torch.equal(answer, expected)

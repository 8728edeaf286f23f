"""Models whose weights change, and the ways to ask them."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_mux
from torch_mux import state

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
ENTRIES = ("call", "gather", "submit")


class Net(nn.Module):
    """A convolution with batch norm, a layer norm and two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 5)
        with torch.no_grad():
            for parameter in (*self.bn.parameters(), *self.norm.parameters()):
                parameter.uniform_(0.5, 1.5)
            self.bn.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr, operator]
            self.bn.running_mean.uniform_(-0.5, 0.5)  # type: ignore[union-attr, operator]

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x))).mean((2, 3))
        return self.down(F.gelu(self.up(self.norm(x))))  # type: ignore[no-any-return]


class Tied(nn.Module):
    """One matrix embeds the tokens and reads the result out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 11)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(F.relu(self.body(self.embed(tokens))))  # type: ignore[no-any-return]


class Normed(nn.Module):
    """All that it reads of its weights are copies."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.LayerNorm(6), nn.LayerNorm(6)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(torch.sin(self.one(x)))  # type: ignore[no-any-return]


class Counter(nn.Module):
    """Its forward writes a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(6, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)  # type: ignore[operator]
        return self.line(x) + self.calls  # type: ignore[no-any-return]


def ask(entry: str, model: Any, *args: Tensor) -> Any:
    """One request of a compiled model by the given entry point."""
    with torch.inference_mode():
        if entry == "gather":
            return torch_mux.gather((model, *args))[0]
        if entry == "submit":
            return torch_mux.submit(model, *args).result(timeout=120)
        return model(*args)


def bundle_sizes() -> dict[int, int]:
    """How many bundles of each size have ended, those that the device is still at work on included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return dict(torch_mux.stats().sizes)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def expected(model: Any, *args: Tensor) -> Tensor:
    """What the original module answers in eager mode."""
    with torch.inference_mode():
        return model._orig_mod(*args)  # type: ignore[no-any-return]


def taught(kind: Callable[[], nn.Module], device: str, *args: Tensor) -> Any:
    """A compiled model that all entry points have been used on."""
    model: Any = torch.compile(kind().eval().to(device), backend="mux", dynamic=False)
    for entry in (*ENTRIES, *ENTRIES):
        close(ask(entry, model, *args), expected(model, *args))
    return model


def picture(device: str) -> Tensor:
    return torch.randn(2, 3, 8, 8, device=device)


def instances(model: Any) -> list[Any]:
    """The engine's instances that use tensors of ``model`` alone."""
    tensors = frozenset(map(id, (*model.parameters(), *model.buffers())))
    return [found for found in state.engine()._instances() if found.uses_only(tensors)]


@contextmanager
def quick_collections() -> Iterator[None]:
    """What is there already is not walked again: a collection looks at what was made inside only."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether ``condition`` comes true while the runtime's threads clean up."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        gc.collect()
        time.sleep(0.01)
    return True


def scaled(path: str) -> Callable[[Any], None]:
    """A change in place of the tensor at ``path``; small, since tests repeat it and round in float32."""

    def change(model: Any) -> None:
        with torch.no_grad():
            tensor = model._orig_mod
            for name in path.split("."):
                tensor = getattr(tensor, name)
            tensor.mul_(1.1).add_(0.1)

    return change


def observed(model: nn.Module) -> list[weakref.ref[Any]]:
    """Replaces every parameter's memory by an array, whose end is that of the last storage over it."""
    found = []
    for parameter in model.parameters():
        array = parameter.detach().numpy().copy()
        parameter.data = torch.from_numpy(array)
        found.append(weakref.ref(array))
    return found

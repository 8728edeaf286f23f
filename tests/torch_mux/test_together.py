"""Guarded calls of one ``gather``: one bundle a graph, whatever the threads do."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_mux
from torch_mux import carry, together
from torch_mux.together import Assembly

COUNT = 16


class Counting(nn.Module):
    """Guarded: it counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.count = nn.Linear(8, 8), 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.fc(x).relu()  # type: ignore[no-any-return]


class Breaking(nn.Module):
    """Guarded: two graphs a call."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x).relu()
        torch._dynamo.graph_break()
        return self.two(y)  # type: ignore[no-any-return]


class Failing(nn.Module):
    """Fails before its graph, or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.fail = nn.Linear(8, 8), False

    @torch.compiler.disable(recursive=False)
    def forward(self, x: Tensor) -> Tensor:
        if self.fail:
            raise ValueError("no")
        return self.fc(x)  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def compiled(kind: type[nn.Module], count: int = COUNT) -> list[Any]:
    return [torch.compile(kind().eval(), backend="mux", dynamic=False) for _ in range(count)]


def rounds(models: list[Any], count: int, inputs: Any = None) -> dict[int, int]:
    """Bundles by size of ``count`` rounds after two that compile and learn."""
    x = torch.randn(2, 8)
    for _ in range(2):
        torch_mux.gather(*[(model, x) for model in models])
    before = dict(torch_mux.stats().sizes)
    for _ in range(count):
        for model, y in zip(models, torch_mux.gather(*[(model, x) for model in models])):
            torch.testing.assert_close(y, model._orig_mod(x), rtol=1e-3, atol=1e-4)
    return {
        size: number - before.get(size, 0)
        for size, number in torch_mux.stats().sizes.items()
        if number != before.get(size, 0)
    }


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "PATIENCE", 20.0)


@pytest.mark.usefixtures("patient")
def test_guarded_calls_go_out_in_one_bundle() -> None:
    assert rounds(compiled(Counting), 3) == {COUNT: 3}
    assert "Counting: calls stay on the guarded path" in str(torch_mux.explain())


@pytest.mark.usefixtures("patient")
def test_every_graph_of_broken_calls_goes_out_in_one_bundle() -> None:
    assert rounds(compiled(Breaking, 4), 2) == {4: 4}


@pytest.mark.usefixtures("patient")
def test_more_calls_than_threads() -> None:
    count = carry.WORKERS + 8
    sizes = rounds(compiled(Counting, count), 1)
    assert sum(size * number for size, number in sizes.items()) == count
    assert max(sizes) == carry.WORKERS + 1


@pytest.mark.usefixtures("patient")
def test_a_call_that_fails_before_its_graph_keeps_nobody_waiting() -> None:
    models = [*compiled(Failing, 4), *compiled(Counting, 1)]
    x = torch.randn(2, 8)
    for _ in range(2):
        torch_mux.gather(*[(model, x) for model in models])
    models[0]._orig_mod.fail = True
    start = time.monotonic()
    with pytest.raises(ValueError, match="no"):
        torch_mux.gather(*[(model, x) for model in models])
    assert time.monotonic() - start < 10


def test_nobody_waits_for_long() -> None:
    """One member is held up by what the other one holds."""
    assembly, lock, passed = Assembly(2, 2), threading.Lock(), []

    def first() -> None:
        with lock:
            assembly.arrive()
            assembly.arrive()
        passed.append("first")
        assembly.leave()

    def second() -> None:
        time.sleep(0.001)
        with lock:
            assembly.arrive()
        passed.append("second")
        assembly.leave()

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert sorted(passed) == ["first", "second"]

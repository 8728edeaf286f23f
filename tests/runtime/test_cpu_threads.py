"""Small programs leave the other cores alone on the CPU, and nobody else notices."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import torch_mux
from torch_mux.compat.cpu_threads import threads as narrowed
from torch_mux.runtime.executors.cpu import CpuExecutor

THREADS = 3


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def _elsewhere() -> int:
    """The number that a thread finds which has never computed."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_only_this_thread_is_narrow_and_only_inside() -> None:
    with narrowed(1):
        assert torch.get_num_threads() == 1
        assert _elsewhere() == THREADS
    assert torch.get_num_threads() == THREADS


def test_an_exception_restores_the_number() -> None:
    with pytest.raises(RuntimeError, match="inside"), narrowed(1):
        raise RuntimeError("inside")
    assert torch.get_num_threads() == THREADS


def _numbers() -> list[str]:
    """What every library that torch computes with says of this thread."""
    return re.findall(r"(?:omp|mkl)_get_max_threads\(\) : (\d+)", torch.__config__.parallel_info())


def test_every_library_is_narrow() -> None:
    before = _numbers()
    assert set(before) == {str(THREADS)}
    with narrowed(1):
        assert _numbers() == ["1"] * len(before)
    assert _numbers() == before


class _Observed(nn.Module):
    """A linear layer; what the executor ran it with is recorded by the test."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, width] to the same."""
        return self.linear(x)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """torch's number of threads at each bundle, in the thread that runs it."""
    seen: list[int] = []
    run = CpuExecutor._run

    def spy(self: CpuExecutor, *arguments: object) -> None:
        seen.append(torch.get_num_threads())
        run(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(CpuExecutor, "_run", spy)
    return seen


@pytest.mark.parametrize(("width", "rows", "threads"), [(32, 2, 1), (1024, 64, THREADS)])
def test_the_size_of_the_program_decides_alone_and_together(
    width: int, rows: int, threads: int, seen: list[int]
) -> None:
    models = [torch.compile(_Observed(width).eval(), backend="mux") for _ in range(3)]
    inputs = [torch.randn(rows, width) for _ in models]
    with torch.inference_mode():
        alone = [model(x) for model, x in zip(models, inputs, strict=True)]
        together = torch_mux.gather(*zip(models, inputs, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
    assert len(seen) >= 2
    assert set(seen) == {threads}
    assert torch.get_num_threads() == THREADS


def test_who_dispatches_does_not_decide(seen: list[int]) -> None:
    """torch keeps a number of threads for each thread, and any client may be the one that dispatches."""
    model, x = torch.compile(_Observed(1024).eval(), backend="mux"), torch.randn(64, 1024)
    with torch.inference_mode():
        first = model(x)
        torch.set_num_threads(1)
        second = model(x)
        (third,) = torch_mux.gather((model, x))
    assert torch.equal(first, second) and torch.equal(first, third)
    assert set(seen) == {THREADS}

"""Many architectures of one class, first called at once: all through mux, or a warning says otherwise."""

from __future__ import annotations

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.types import ConvertFrameReturn

import torch_mux
from torch_mux import backend, compat
from torch_mux.types import FallbackKind

COUNT, THREADS = 64, 16


class Wide(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())  # type: ignore[no-any-return]


def stack(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 4))


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs run operation by operation: what is asked here is whether they are captured."""

    def broken(*_: object) -> Any:
        raise RuntimeError("not compiled in this test")

    monkeypatch.setattr(compat, "inductor_compile", broken)


@pytest.mark.usefixtures("without_inductor")
def test_widths_first_called_at_once_are_all_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[str] = []
    original = backend._capture

    def counting(*args: Any) -> Any:
        captured.append(args[2])
        return original(*args)

    monkeypatch.setattr(backend, "_capture", counting)
    makers = [maker for maker in (Wide, stack) for _ in range(COUNT // 4)]
    widths = [1 + index % (COUNT // 4) for index in range(COUNT // 2)]
    nets = [maker(width).eval() for _ in range(2) for maker, width in zip(makers, widths)]
    models = [torch.compile(net, backend="mux", dynamic=False) for net in nets]
    inputs = [torch.randn(1, 8) for _ in nets]
    gate = threading.Barrier(THREADS)

    def client(worker: int) -> None:
        gate.wait()
        with torch.inference_mode():
            for index in range(worker, COUNT, THREADS):
                got = models[index](inputs[index])
                torch.testing.assert_close(got, nets[index](inputs[index]), rtol=1e-3, atol=1e-4)

    with warnings.catch_warnings(), ThreadPoolExecutor(THREADS) as pool:
        warnings.simplefilter("error", UserWarning)
        for done in [pool.submit(client, worker) for worker in range(THREADS)]:
            done.result(timeout=300)
    assert len(captured) == COUNT // 2
    explained = torch_mux.explain()
    assert len(explained.programs) == COUNT // 2 and not explained.notes
    assert all(program.instances == 2 for program in explained.programs)
    assert torch_mux.stats().requests == COUNT


@pytest.mark.usefixtures("without_inductor")
def test_what_ends_up_eager_at_the_recompile_limit_is_said() -> None:
    x = torch.randn(1, 8)
    with torch._dynamo.config.patch(recompile_limit=3), torch.inference_mode():
        for width in (1, 2, 3):
            torch.compile(Wide(width).eval(), backend="mux", dynamic=False)(x)
        assert not torch_mux.explain().notes
        last = Wide(4).eval()
        with pytest.warns(UserWarning, match="Wide: Dynamo's recompile limit is reached"):
            got = torch.compile(last, backend="mux", dynamic=False)(x)
        torch.testing.assert_close(got, last(x))
    (note,) = torch_mux.explain().notes
    assert note.reason.kind is FallbackKind.LIMIT
    assert "recompile_limit" in str(torch_mux.explain())


def test_a_suppressed_error_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> Any:
        raise ValueError("no such graph")

    monkeypatch.setattr(backend, "_capture", failing)
    net, x = Wide(5).eval(), torch.randn(1, 8)
    with torch._dynamo.config.patch(suppress_errors=True), torch.inference_mode():
        with pytest.warns(UserWarning, match="Wide: Dynamo gave it up"):
            got = torch.compile(net, backend="mux", dynamic=False)(x)
        torch.testing.assert_close(got, net(x))
    assert [note.reason.kind for note in torch_mux.explain().notes] == [FallbackKind.GIVEN_UP]


class Stubborn(Wide):
    """Breaks its graph where Dynamo cannot resume, so that it runs the frame in eager PyTorch."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            x = layer(x)
            torch._dynamo.graph_break()
        return x


@pytest.mark.skipif(
    not hasattr(ConvertFrameReturn(), "skip_reason"), reason="torch 2.11 does not say why it skips a frame"
)
@pytest.mark.usefixtures("without_inductor")
def test_a_frame_that_dynamo_skips_is_said() -> None:
    net, x = Stubborn(6).eval(), torch.randn(1, 8)
    with torch.inference_mode(), pytest.warns(UserWarning, match="Dynamo gave it up"):
        got = torch.compile(net, backend="mux", dynamic=False)(x)
    torch.testing.assert_close(got, net.second(net.first(x)))

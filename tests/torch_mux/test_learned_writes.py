"""Attribute writes that a frame repeats after its graph: harmless where they change nothing, else refused."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import torch_mux


class Flag:
    """Module-level state, as libraries keep it while they trace."""

    def __init__(self) -> None:
        self.busy = False
        self.depth: int | None = None


FLAG = Flag()


class Restores(nn.Module):
    """Leaves the state as it found it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        FLAG.busy = True
        FLAG.depth = 1
        y: Tensor = self.layer(x)
        FLAG.busy = False
        FLAG.depth = None
        return y


class Changes(Restores):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        FLAG.depth = 7
        return y


def _notes() -> str:
    return str(torch_mux.explain())


def test_a_write_of_what_is_there_is_learned() -> None:
    FLAG.__init__()  # type: ignore[misc]
    model = Restores().eval()
    compiled, x = torch.compile(model, backend="mux"), torch.randn(2, 4)
    with torch.inference_mode():
        for _ in range(3):
            torch.testing.assert_close(torch_mux.gather((compiled, x))[0], model.layer(x))
    assert "guarded path" not in _notes()
    assert (FLAG.busy, FLAG.depth) == (False, None)


def test_a_write_that_changes_something_is_repeated_on_every_call() -> None:
    FLAG.__init__()  # type: ignore[misc]
    model = Changes().eval()
    compiled, x = torch.compile(model, backend="mux"), torch.randn(2, 4)
    with torch.inference_mode():
        for _ in range(3):
            FLAG.depth = None
            torch.testing.assert_close(torch_mux.gather((compiled, x))[0], model.layer(x))
            assert FLAG.depth == 7
    assert "'depth' is written" in _notes()

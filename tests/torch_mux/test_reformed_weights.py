"""Weights that ``.to()`` gave another form behind Dynamo's back: the old entry serves them all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_mux
from torch_mux.backend import mux
from torch_mux.errors import RefreshNeeded


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.line = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.line(F.relu(self.conv(x)).mean((2, 3)))  # type: ignore[no-any-return]


def _entry(model: nn.Module, x: Tensor) -> tuple[Callable[..., Any], list[Any]]:
    """The callable that Dynamo's code holds for ``model``, and the flat arguments that it is called with."""
    found: list[Any] = []

    def backend(graph: Any, examples: Any) -> Callable[..., Any]:
        compiled = mux(graph, examples)

        def run(*args: Any) -> Any:
            found[:] = [compiled, list(args)]
            return compiled(*args)

        return run

    with torch.inference_mode():
        torch.compile(model, backend=backend)(x)
    return found[0], found[1]


def test_other_strides_and_back() -> None:
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    entry, args = _entry(model, x)
    with torch.inference_mode():
        want = model(x)
        for form in (torch.channels_last, torch.contiguous_format, torch.channels_last):
            model.to(memory_format=form)  # type: ignore[call-overload]
            for _ in range(2):
                torch.testing.assert_close(entry(*args)[0], want, rtol=1e-5, atol=1e-5)
    programs = torch_mux.explain().programs
    assert len(programs) == 2
    assert all(program.coalesced for program in programs)


def test_a_form_that_the_operations_do_not_take_stays_an_error() -> None:
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    entry, args = _entry(model, x)
    model.line.weight.data = torch.randn(5, 9)
    with torch.inference_mode(), pytest.raises(RefreshNeeded, match="became"):
        entry(*args)

"""A rate counts calls: one with graph breaks takes one token, however many graphs it runs."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from torch import Tensor, nn

import torch_mux
from torch_mux.breaks import continued
from torch_mux.types import Quota


class Broken(nn.Module):
    """Three graphs a call; what ``say`` raises comes between the first and the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))
        self.say = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        talk(self)
        x = self.second(x)
        torch._dynamo.graph_break()
        return self.third(x)


@torch._dynamo.disable
def talk(model: Broken) -> None:
    model.say()


def test_a_call_with_graph_breaks_takes_one_token() -> None:
    model, x = Broken().eval(), torch.ones(2, 4)
    served = torch.compile(model, backend="mux")
    with torch.inference_mode():
        expected = model(x)
        served(x)
        assert torch_mux.stats().tenants["default"].accepted == 3
        with torch_mux.quota("alice", rate=1e-3, burst=4, excess="refuse"):
            for _ in range(4):
                torch.testing.assert_close(served(x), expected)
            with pytest.raises(torch_mux.RateExceeded):
                served(x)
    got = torch_mux.stats().tenants["alice"]
    assert got.accepted == got.ok == 12


def test_a_call_that_raises_between_its_graphs_leaves_no_free_calls() -> None:
    model, x = Broken().eval(), torch.ones(2, 4)
    served = torch.compile(model, backend="mux")

    def fail() -> None:
        raise KeyError("between")

    with torch.inference_mode():
        served(x)
        with torch_mux.quota("alice", rate=1e-3, burst=3, excess="refuse"):
            model.say = fail
            with pytest.raises(KeyError):
                served(x)
            model.say = lambda: None
            served(x)
            served(x)
            with pytest.raises(torch_mux.RateExceeded):
                served(x)


class Trailing(nn.Module):
    """It breaks off where nothing is left to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.only(x)
        torch._dynamo.graph_break()
        return x


def test_a_break_at_the_end_pays_for_nobody_else() -> None:
    models = [torch.compile(model.eval(), backend="mux") for model in (Trailing(), nn.Linear(4, 2), Broken())]
    x = torch.ones(2, 4)
    with torch.inference_mode():
        for model in models:
            model(x)
        with torch_mux.quota("alice", rate=1e-3, burst=6, excess="refuse"):
            for _ in range(2):
                for model in models:
                    model(x)
            for model in models:
                with pytest.raises(torch_mux.RateExceeded):
                    model(x)


def test_other_sizes_are_another_call() -> None:
    model = torch.compile(Trailing().eval(), backend="mux", dynamic=True)
    with torch.inference_mode():
        for rows in (2, 3, 4):
            model(torch.ones(rows, 4))
        with torch_mux.quota("alice", rate=1e-3, burst=2, excess="refuse"):
            model(torch.ones(2, 4))
            model(torch.ones(3, 4))
            with pytest.raises(torch_mux.RateExceeded):
                model(torch.ones(4, 4))


def test_graphs_of_what_a_broken_frame_calls_belong_to_its_call() -> None:
    quota = Quota("carol", rate=1.0)

    def resumed(found: list[bool]) -> None:
        found.append(continued(quota, True) is quota)
        found.append(continued(quota, False) is quota)

    def inner(found: list[bool]) -> None:
        found.append(continued(quota, True) is quota)
        resumed(found)

    def outer(found: list[bool], fails: bool = False) -> None:
        found.append(continued(quota, True) is quota)
        inner(found)
        inner(found)
        if fails:
            raise KeyError("between")
        resumed(found)

    for fails in (False, True, False):
        found: list[bool] = []
        with pytest.raises(KeyError) if fails else contextlib.nullcontext():
            outer(found, fails)
        assert found[0] and not any(found[1:])
        assert continued(quota, False) is continued(quota, False) is quota
    other: list[bool] = []

    def elsewhere() -> None:
        assert continued(quota, True) is quota
        thread = threading.Thread(target=lambda: other.append(continued(quota, False) is quota))
        thread.start()
        thread.join()

    elsewhere()
    assert other == [True]
    plain = Quota("bob")
    assert continued(plain, True) is plain

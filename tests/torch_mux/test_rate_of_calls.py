"""A rate counts calls: one with graph breaks takes one token, however many graphs it runs."""

from __future__ import annotations

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


def test_graphs_of_what_a_broken_frame_calls_belong_to_its_call() -> None:
    quota = Quota("carol", rate=1.0)

    def counts(name: str, resumed: bool, breaks: bool) -> bool:
        return continued(graphs.setdefault(name, object()), quota, resumed, breaks) is quota

    graphs: dict[str, object] = {}
    for _ in range(2):
        assert counts("outer", False, True)
        assert not counts("inner", False, True)
        assert not counts("inner resumed", True, False)
        assert not counts("whole", False, False)
        assert not counts("outer resumed", True, True)
        assert not counts("outer resumed", True, True)  # a loop
        assert not counts("outer end", True, False)
    assert counts("whole", False, False)
    assert counts("whole", False, False)
    assert counts("resumed without a graph before", True, False)
    other: list[bool] = []
    assert counts("outer", False, True)
    thread = threading.Thread(target=lambda: other.append(counts("outer resumed", True, False)))
    thread.start()
    thread.join()
    assert other == [True]
    plain = Quota("bob")
    assert continued(object(), plain, True, True) is plain

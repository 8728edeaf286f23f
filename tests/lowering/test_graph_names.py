"""What a graph of Dynamo's is kept under: another name whenever anything about it is another."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
from kept_files import Small
from torch import Tensor, nn
from torch.fx import GraphModule

from torch_mux.compat import saved_code
from torch_mux.lowering import kept_programs


def name(make: Callable[[], Any], *inputs: Tensor) -> str | None:
    """What the graph of a fresh model would be kept under."""
    torch._dynamo.reset()
    found: list[str | None] = []

    def backend(graph: GraphModule, given: Any) -> Callable[..., Any]:
        found.append(kept_programs.name_of(graph, given))
        return graph.forward

    torch.manual_seed(0)
    model = make()
    compiled: Any = torch.compile(
        model.eval() if isinstance(model, nn.Module) else model, backend=backend, dynamic=False
    )
    with torch.inference_mode():
        compiled(*inputs)
    (only,) = found
    return only


X = torch.randn(1, 3, 6, 6)


@contextlib.contextmanager
def _default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _other_installation() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saved_code.source_keys, "installed", lambda: "another")
        yield


@contextlib.contextmanager
def _other_sources() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_programs.kept, "sources", lambda: "another")
        yield


CIRCUMSTANCES = {
    "the installation": _other_installation,
    "our sources": _other_sources,
    "the default dtype": _default_dtype,
    "kernels of attention": lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    "AOTAutograd's settings": lambda: functorch_config.patch(  # type: ignore[attr-defined]
        view_replay_for_aliased_outputs=not functorch_config.view_replay_for_aliased_outputs
    ),
}


@pytest.mark.parametrize("what", CIRCUMSTANCES)
def test_under_other_circumstances_it_is_another_graph(what: str) -> None:
    before = name(Small, X)
    assert before is not None and name(Small, X) == before
    with CIRCUMSTANCES[what]():
        within = name(lambda: Small().float(), X)
    assert within is not None and within != before
    assert name(Small, X) == before


def strided() -> Tensor:
    return X.permute(0, 1, 3, 2)


GRAPHS: dict[str, tuple[Callable[[], Any], Callable[[], Tensor]]] = {
    "a constant": (lambda: Small(0.2), lambda: X),
    "the type of a constant": (lambda: Small(1), lambda: X),
    "a shape": (Small, lambda: torch.randn(2, 3, 6, 6)),
    "strides": (Small, strided),
    "an offset in memory": (Small, lambda: torch.randn(X.numel() + 16)[16:].view(X.shape)),
    "a dtype": (lambda: Small().double(), X.double),
    "no inference tensor": (Small, lambda: X.clone()),
}


@pytest.mark.parametrize("what", GRAPHS)
def test_another_graph_or_input_is_another_name(what: str) -> None:
    make, given = GRAPHS[what]
    with torch.inference_mode():
        plain = X.clone()
    names = [name(Small, plain), name(lambda: Small(1.0), plain), name(make, given())]
    assert None not in names and len(set(names)) == 3


def test_inputs_that_share_memory_are_others() -> None:
    base = torch.randn(2, 2, 4)

    def add(x: Tensor, y: Tensor) -> Tensor:
        return x + y

    apart = name(lambda: add, base[0][0], torch.randn(2, 2, 4)[1][0])
    shared = name(lambda: add, base[0][0], base[1][0])
    assert None not in (apart, shared) and apart != shared


def test_a_function_put_in_the_place_of_pytorchs_is_not_known() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = X
    graph.output((graph.call_function(F.silu, (x,)),))
    module = GraphModule(nn.Module(), graph)
    known = kept_programs.name_of(module, [X])
    assert known is not None

    def silu(x: Tensor, inplace: bool = False) -> Tensor:
        return x

    for replacement in (silu, torch.no_grad()(silu)):
        for node in graph.nodes:
            if node.op == "call_function":
                node.target = replacement
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "silu", replacement)
            assert kept_programs.name_of(module, [X]) is None

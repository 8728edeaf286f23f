"""Parameter-only arithmetic on vectors runs once for all layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from torch_mux.lowering.batch_vectors import batch_vectors


def _traced(function: Callable[..., Any], values: list[Tensor]) -> GraphModule:
    with torch.no_grad():
        return make_fx(function, tracing_mode="fake")(*values)


def _batched(module: GraphModule) -> GraphModule:
    graph = batch_vectors(module.graph)
    graph.lint()
    return GraphModule(module, graph)


def _arithmetic(graph: Graph) -> Counter[str]:
    moves = ("cat", "split", "getitem", "view")
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    return Counter(name for name in names if not any(move in name for move in moves))


def _fold(*values: Tensor) -> list[Tensor]:
    results = []
    for at in range(0, len(values), 4):
        w, b, mean, var = values[at : at + 4]
        scale = w.float() * torch.rsqrt(var.float() + 1e-5)
        results += [scale, b.float() - mean.float() * scale]
    return results


def _norms(layers: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.rand(3 + layer % 5, dtype=dtype) + 0.5 for layer in range(layers) for _ in range(4)]


@pytest.mark.parametrize("layers", [2, 53])
def test_a_fold_takes_as_many_operations_as_one_layers(layers: int) -> None:
    values = _norms(layers, torch.float16)
    one, module = _batched(_traced(_fold, values[:4])), _traced(_fold, values)
    batched = _batched(module)
    assert _arithmetic(batched.graph) == _arithmetic(one.graph)
    for result, wanted in zip(batched(*values), module(*values), strict=True):
        assert result.dtype == torch.float32
        assert torch.allclose(result, wanted, rtol=1e-6, atol=1e-6)


def test_what_follows_a_reshape_is_not_joined_with_what_it_needs() -> None:
    def function(x: Tensor, y: Tensor) -> list[Tensor]:
        first = x * 2 + 1
        again = first.view(2, 3).t().reshape(6)
        return [again * 2 + 1, y * 2 + 1]

    values = [torch.rand(6), torch.rand(6)]
    module = _traced(function, values)
    batched = _batched(module)
    assert _arithmetic(batched.graph)["aten.mul.Tensor"] == 2
    for result, wanted in zip(batched(*values), module(*values), strict=True):
        assert torch.equal(result, wanted)


def test_different_constants_types_and_sizes_of_operands_stay_apart() -> None:
    def function(a: Tensor, b: Tensor, c: Tensor, d: Tensor, scalar: Tensor) -> list[Tensor]:
        return [a + 1, b + 2, c + 1, d * 0.0, d * -0.0, a * scalar, b * scalar]

    values = [torch.rand(3), torch.rand(4), torch.arange(3), torch.rand(2), torch.rand(1)]
    module = _traced(function, values)
    batched = _batched(module)
    assert not any("cat" in str(node.target) for node in batched.graph.nodes)
    for result, wanted in zip(batched(*values), module(*values), strict=True):
        assert torch.equal(result, wanted) and torch.equal(result.signbit(), wanted.signbit())


OPERATIONS: list[Callable[..., Tensor]] = [
    lambda x, y: x * y,
    lambda x, y: x + y,
    lambda x, y: x - 3 * y,
    lambda x, y: x.neg(),
    lambda x, y: x.view(-1, 1).expand(-1, 2).sum(1),
    lambda x, y: (x.double() * 2).float(),
]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_random_graphs_mean_the_same(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    steps = data.draw(st.lists(st.tuples(*[st.integers(0, 99)] * 3), min_size=1, max_size=12))
    values = [torch.arange(size, dtype=torch.float32) + place for place, size in enumerate(sizes * 2)]

    def function(*vectors: Tensor) -> list[Tensor]:
        known = list(vectors)
        for operation, first, second in steps:
            x = known[first % len(known)]
            alike = [y for y in known if y.shape == x.shape]
            known.append(OPERATIONS[operation % len(OPERATIONS)](x, alike[second % len(alike)]))
        return known[len(vectors) :]

    module = _traced(function, values)
    for result, wanted in zip(_batched(module)(*values), module(*values), strict=True):
        assert torch.equal(result, wanted)


def test_a_long_chain_whose_operands_meet_again_takes_no_longer() -> None:
    """Each operation uses one result twice: keys that held their operands' keys would double every time."""

    def doubled(*values: Tensor) -> list[Tensor]:
        results = list(values)
        for _ in range(60):
            results = [value * value for value in results]
        return results

    values = [torch.ones(size) for size in (3, 4, 5)]
    module = _traced(doubled, values)
    batched = _batched(module)
    assert _arithmetic(batched.graph) == {"aten.mul.Tensor": 60}
    assert all(torch.equal(*pair) for pair in zip(batched(*values), module(*values), strict=True))

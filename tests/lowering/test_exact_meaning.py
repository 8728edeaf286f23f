"""Corners where the slot axis, the tables or a program's identity could change what an operation means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_mux
from torch_mux.lowering.graphs import fake_of
from torch_mux.types import FallbackKind

NAN = float("nan")


class Applied(nn.Module):
    """A function of one buffer and the inputs."""

    def __init__(self, function: Callable[..., Any], weight: Tensor) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("weight", weight)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self.weight, *inputs)


def _together(models: list[nn.Module], inputs: list[tuple[Tensor, ...]]) -> None:
    with torch.inference_mode():
        compiled: list[Any] = [torch.compile(model, backend="mux", dynamic=False) for model in models]
        calls = [(model, *given) for model, given in zip(compiled, inputs, strict=True)]
        for _ in range(2):
            answers = torch_mux.gather(*calls)
            for answer, model, given in zip(answers, models, inputs, strict=True):
                torch.testing.assert_close(answer, model(*given), equal_nan=True)


def _half_alpha(weight: Tensor, bias: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.baddbmm(bias, one, other, beta=0, alpha=0.5) + weight


def _without_bias(weight: Tensor, bias: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.addmm(bias, one, other, beta=0) + weight


def test_a_beta_of_zero_ignores_the_bias() -> None:
    for function, batch in ((_half_alpha, (2,)), (_without_bias, ())):
        inputs = [(torch.full((5,), NAN), torch.randn(*batch, 3, 4), torch.randn(*batch, 4, 5))] * 2
        _together([Applied(function, torch.randn(5)) for _ in range(2)], inputs)


def test_a_scalar_parameter_does_not_widen_a_comparison() -> None:
    weights = [torch.tensor(value, dtype=torch.float64) for value in (0.1, 0.2)]
    _together([Applied(lambda w, x: x == w, w) for w in weights], [(torch.tensor([0.1, 0.2, 0.3]),)] * 2)


def test_strides_that_a_function_reads_are_those_of_its_caller() -> None:
    def function(weight: Tensor, x: Tensor) -> Tensor:
        return x.as_strided((4, 3), (6, 1)) * weight

    inputs = [(torch.randn(4, 6)[:, ::2],) for _ in range(2)]
    _together([Applied(function, torch.randn(3)) for _ in range(2)], inputs)


def test_as_strided_is_a_typed_reason(program_of: Callable[..., Any]) -> None:
    program = program_of(lambda x: x.as_strided((2,), (3,)) + 0, [torch.randn(2, 3)], [])
    assert program.fallback is not None and program.fallback.kind is FallbackKind.SUBCLASS
    assert "as_strided" in str(program.fallback)


def test_an_expanded_result_can_be_returned() -> None:
    def function(weight: Tensor, x: Tensor) -> Tensor:
        return (x.sum(0, keepdim=True) * weight).expand(2, 5, -1)

    models = [Applied(function, torch.randn(4)) for _ in range(2)]
    _together(models, [(torch.randn(3, 4),) for _ in range(2)])


class Summed(nn.Module):
    """A branch whose sides add and subtract."""

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda a, b: a + b, lambda a, b: a - b, (x, y))


class Multiplied(nn.Module):
    """The same shape of graph, with other sides."""

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda a, b: a * b, lambda a, b: a / b, (x, y))


def test_what_a_branch_does_is_part_of_the_identity() -> None:
    _together([Summed(), Multiplied()], [(torch.rand(3), torch.rand(3)) for _ in range(2)])


@pytest.mark.parametrize("form", ["transposed", "sliced"])
def test_an_embedding_reads_dense_rows(
    form: str, program_of: Callable[..., Any], lowered: Callable[..., Any]
) -> None:
    def function(indices: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(indices, weight.t() if form == "transposed" else weight[:, 2:6])

    values = [torch.randint(0, 5, (2, 3)), torch.randn(5, 8)]
    module = lowered(program_of(function, values[:1], values[1:]))
    node = next(node for node in module.graph.nodes if str(node.target) == "aten.embedding.default")
    assert fake_of(node.args[0]).is_contiguous()
    result = module(*values)
    torch.testing.assert_close(result[0] if isinstance(result, tuple) else result, function(*values))


def test_a_copy_for_alignment_keeps_the_strides(batched: Callable[..., Any]) -> None:
    def function(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight[:, 1:])

    inputs, weight = torch.randn(3, 4), torch.randn(6, 5)
    lowering = batched(function, [inputs], [weight])
    storage = lowering.run.storage
    row = storage.bind([weight])
    (held,) = storage.weights([row], 0)
    assert held.data_ptr() % 16 == 0 and held.stride() == (5, 1)
    torch.testing.assert_close(lowering.run([[inputs]], [[weight]])[0][0], function(inputs, weight))

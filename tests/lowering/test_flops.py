"""What counts as work, and which of it coalesces; identities of strides are no operations at all."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_mux
from torch_mux.lowering.flops import flops_of
from torch_mux.report import ProgramExplanation
from torch_mux.types import FallbackKind, FallbackReason


def explained(model: nn.Module, x: Tensor) -> ProgramExplanation:
    with torch.inference_mode():
        got, expected = torch.compile(model.eval(), backend="mux")(x), model(x)
        torch.testing.assert_close(got, expected)
        assert got.stride() == expected.stride()
    (program,) = torch_mux.explain().programs
    return program


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 16, 4, stride=4), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = F.scaled_dot_product_attention(x, x, x)
        return self.head(x)  # type: ignore[no-any-return]


def test_convolutions_products_and_attention_are_counted() -> None:
    program = explained(Attending(), torch.randn(2, 3, 8, 8))
    tokens = 2 * 4
    convolution, attention, head = tokens * 3 * 16 * 16, 2 * 2 * 4 * 4 * 16, tokens * 16 * 5
    assert program.flops == 2 * (convolution + attention + head)
    assert program.flops_alone == 0 and program.coalesced_flops == 1.0
    assert "100% of the FLOPs coalesced" in str(program)


class Partly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flat, self.deep = nn.Conv2d(4, 4, 1), nn.Conv3d(1, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.deep(self.flat(x)[:, None])  # type: ignore[no-any-return]


def test_what_runs_per_instance_is_told_apart_and_counted_by_reason() -> None:
    program = explained(Partly(), torch.randn(1, 4, 6, 6))
    flat, deep = 2 * 36 * 4 * 4, 2 * (3 * 5 * 5) * 2 * 8
    assert (program.flops, program.flops_alone) == (flat + deep, deep)
    assert program.coalesced_flops == pytest.approx(flat / (flat + deep))
    (reason,) = program.reasons
    assert reason == FallbackReason(FallbackKind.NO_RULE, "aten.convolution.default", reason.detail)
    assert program.counts == {reason: 1}


class Spectral(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(torch.fft.fft(x)).abs()


def test_a_program_without_work_has_no_share() -> None:
    program = explained(Spectral(), torch.randn(2, 6))
    assert program.flops == 0 and program.coalesced_flops is None
    assert sum(program.counts.values()) == program.alone and "FLOPs" not in str(program)


class Pooled(nn.Module):
    """Global pooling of a channels-last image: ATen sets the strides of the dimensions of size 1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.head = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.conv(x)).flatten(1))  # type: ignore[no-any-return]


class Pooling(Pooled):
    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("model", [Pooled, Pooling])
@pytest.mark.parametrize("batch", [1, 2])
def test_strides_of_single_elements_are_no_reason_to_fall_back(model: type[Pooled], batch: int) -> None:
    image = torch.randn(batch, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    program = explained(model().to(memory_format=torch.channels_last), image)  # type: ignore[call-overload]
    assert program.reasons == () and program.coalesced


class Windows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.as_strided((3, 3), (2, 1)) + 1


def test_reading_memory_by_strides_still_does() -> None:
    (reason,) = explained(Windows(), torch.randn(4, 4)).reasons
    assert (reason.kind, reason.target) == (FallbackKind.SUBCLASS, "aten.as_strided.default")


def test_a_graph_that_knows_no_sizes_counts_as_nothing() -> None:
    graph = torch.fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    product = graph.call_function(torch.ops.aten.mm.default, (x, y))
    graph.output(product)
    assert flops_of(product) == 0

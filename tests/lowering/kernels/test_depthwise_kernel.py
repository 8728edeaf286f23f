"""The depthwise super-kernel in Triton's interpreter, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_mux.lowering.kernels import choose, reference
from torch_mux.lowering.kernels.conv import conv
from torch_mux.lowering.kernels.data import Vector
from torch_mux.lowering.kernels.depthwise import depthwise
from torch_mux.lowering.kernels.geometry import conv_problems

pytestmark = pytest.mark.interpreter
CPU = torch.device("cpu")

# channels in, multiplier, kernel, stride, padding, dilation
GEOMETRIES = {
    "3 by 3": (24, 1, (3, 3), (1, 1), (1, 1), (1, 1)),
    "5 by 5, strided": (70, 1, (5, 5), (2, 2), (2, 2), (1, 1)),
    "dilated, odd": (7, 1, (3, 3), (1, 1), (2, 2), (2, 2)),
    "oblong": (16, 1, (2, 3), (2, 1), (0, 1), (1, 2)),
    "along a line": (16, 1, (1, 9), (1, 1), (0, 4), (1, 1)),
    "one tap": (16, 1, (1, 1), (1, 1), (0, 0), (1, 1)),
    "three of each": (6, 3, (3, 3), (1, 1), (1, 1), (1, 1)),
}


def operands(
    tools: Any, slots: int, shape: tuple[int, int, int, int], o: int, kernel: tuple[int, int], dtype: Any
) -> tuple[Tensor, list[Tensor]]:
    """Images, and weights [O, KH, KW, 1] whose memory is [KH, KW, O]."""
    taps = kernel[0] * kernel[1]
    weights = [tools.guarded((torch.randn(*kernel, o) / taps**0.5).to(dtype)) for _ in range(slots)]
    laid = [weight.permute(2, 0, 1).unsqueeze(3) for weight in weights]
    return tools.guarded(torch.randn(slots, *shape).to(dtype)), laid


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", list(GEOMETRIES))
def test_matches_float64(tools: Any, name: str, dtype: torch.dtype) -> None:
    c, multiplier, kernel, stride, padding, dilation = GEOMETRIES[name]
    o = c * multiplier
    x, weights = operands(tools, 2, (2, 9, 8, c), o, kernel, dtype)
    rows, arena = torch.tensor([1, 0]), torch.randn(2, 2 * o)
    geometry: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": c}
    chosen = [weights[row] for row in rows]
    residual = torch.randn(2, *reference.conv(list(x), chosen, **geometry)[0].shape).to(dtype)
    out = torch.empty_like(residual)
    conv(
        x, tools.table(weights), 1, rows, tools.control(2, 132), out, kernel=kernel, **geometry,
        scale=Vector(arena, 0), shift=Vector(arena, o), residual=residual, activation="hardswish", sms=1,
    )  # fmt: skip
    want = reference.conv(
        list(x), chosen, **geometry, scales=list(arena[rows, :o]), shifts=list(arena[rows, o:]),
        residuals=list(residual), activation="hardswish",
    )  # fmt: skip
    tools.close(out, torch.stack(want), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bits_depend_neither_on_bundle_nor_on_tile(tools: Any, filled: Any, dtype: torch.dtype) -> None:
    x, weights = operands(tools, 3, (1, 9, 8, 70), 70, (3, 3), dtype)
    table = tools.table(weights)
    named: dict[str, Any] = {"kernel": (3, 3), "padding": (1, 1), "activation": "silu"}
    whole = filled(3, 1, 9, 8, 70, dtype=dtype)
    depthwise(x, table, 1, torch.arange(3), tools.control(3, 132), whole, sms=3, **named)
    for slot, tile in enumerate((*choose.depthwise_candidates()[::2],)):
        alone = filled(1, 1, 9, 8, 70, dtype=dtype)
        rows = torch.tensor([slot])
        depthwise(x[slot : slot + 1], table, 1, rows, tools.control(1, 1), alone, sms=1, tile=tile, **named)
        assert torch.equal(alone[0], whole[slot])
    order = torch.tensor([2, 0, 1])
    for active, cap in [(3, 1), (2, 2), (0, 132)]:
        out = filled(3, 1, 9, 8, 70, dtype=dtype)
        depthwise(x[order].contiguous(), table, 1, order, tools.control(active, cap), out, sms=2, **named)
        assert torch.equal(out[:active], whole[order][:active])
        assert bool((out[active:] == 7.0).all())


SHAPE = st.tuples(st.integers(1, 2), st.integers(3, 9), st.integers(3, 9), st.sampled_from([3, 16, 20, 70]))


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    shapes=st.lists(SHAPE, min_size=1, max_size=4),
    multiplier=st.sampled_from([1, 1, 2]),
    cap=st.integers(1, 3),
    data=st.data(),
)
def test_slots_of_unequal_sizes(
    shapes: list[tuple[int, int, int, int]], multiplier: int, cap: int, data: st.DataObject
) -> None:
    active = data.draw(st.integers(0, len(shapes)))
    torch.manual_seed(len(shapes))
    xs = [torch.randn(shape) for shape in shapes]
    stored = [torch.randn(3, 3, shape[3] * multiplier) / 3 for shape in shapes]
    want = [
        reference.conv([x], [weight.permute(2, 0, 1).unsqueeze(3)], padding=(1, 1), groups=x.shape[3])[0]
        for x, weight in zip(xs, stored, strict=True)
    ]
    x_offsets, out_offsets, x_end, out_end = [], [], 0, 0
    for each, result in zip(xs, want, strict=True):
        x_offsets.append(x_end)
        out_offsets.append(out_end)
        x_end += each.numel() + 5
        out_end += result.numel() + 3
    x, out = torch.full((x_end,), float("nan")), torch.full((out_end,), 7.0)
    for offset, each in zip(x_offsets, xs, strict=True):
        x[offset : offset + each.numel()] = each.flatten()
    sizes = [(*shape, shape[3] * multiplier) for shape in shapes]
    geometry: dict[str, Any] = {"kernel": (3, 3), "padding": (1, 1)}
    depthwise(
        x, torch.tensor([[weight.data_ptr()] for weight in stored]), 0, torch.arange(len(shapes)),
        torch.tensor([active, cap], dtype=torch.int32), out, sms=2,
        problems=conv_problems(sizes, x_offsets, out_offsets, CPU, **geometry), **geometry,
    )  # fmt: skip
    written = torch.zeros(out_end, dtype=torch.bool)
    for at, result in zip(out_offsets[:active], want, strict=False):
        written[at : at + result.numel()] = True
        got = out[at : at + result.numel()].view(result.shape)
        torch.testing.assert_close(got.double(), result, rtol=1e-5, atol=1e-5)
    assert bool((out[~written] == 7.0).all())


def test_refuses_what_it_cannot_read(tools: Any) -> None:
    x, weights = operands(tools, 1, (1, 6, 6, 16), 16, (3, 3), torch.float16)
    common = (tools.table(weights), 1, torch.arange(1), tools.control(1, 1))
    with pytest.raises(ValueError, match="out must be"):
        depthwise(x, *common, torch.empty(1, 1, 6, 6, 16, dtype=torch.float16), kernel=(3, 3))
    with pytest.raises(ValueError, match="one whole multiple"):
        depthwise(x, *common, torch.empty(1, 1, 4, 4, 24, dtype=torch.float16), kernel=(3, 3))
    with pytest.raises(ValueError, match="cannot be split"):
        conv(x, *common, torch.empty(1, 1, 4, 4, 16, dtype=torch.float16), kernel=(3, 3), groups=5)

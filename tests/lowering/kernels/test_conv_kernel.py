"""The convolution super-kernel in Triton's interpreter, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_mux.lowering.kernels import reference
from torch_mux.lowering.kernels.conv import conv
from torch_mux.lowering.kernels.data import BitClass, Family, Tile, Vector
from torch_mux.lowering.kernels.geometry import conv_problems, out_size

pytestmark = pytest.mark.interpreter
CPU = torch.device("cpu")

# channels in, channels out, kernel, stride, padding, dilation, groups
GEOMETRIES = {
    "stem": (3, 20, (7, 7), (2, 2), (3, 3), (1, 1), 1),
    "stem of 4": (4, 16, (5, 5), (2, 2), (2, 2), (1, 1), 1),
    "stem, columns folded": (8, 16, (7, 4), (2, 1), (0, 0), (1, 1), 1),
    "narrow, no border": (12, 16, (3, 3), (2, 1), (0, 0), (1, 2), 1),
    "narrow": (16, 24, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "wide": (64, 32, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "wide, uneven": (72, 10, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "oblong, dilated": (64, 48, (3, 2), (2, 1), (0, 0), (2, 1), 1),
    "oblong, padded unevenly": (64, 16, (2, 3), (1, 2), (1, 0), (1, 2), 1),
    "25 taps, dilated": (64, 8, (5, 5), (1, 1), (4, 4), (2, 2), 1),
    "49 taps, more than a word has bits": (64, 8, (7, 7), (2, 2), (3, 3), (1, 1), 1),
    "dilated, padded": (20, 8, (3, 3), (1, 1), (2, 2), (2, 2), 1),
    "pointwise": (24, 16, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "pointwise, strided": (24, 16, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    "pointwise, padded": (8, 16, (1, 1), (1, 1), (1, 1), (1, 1), 1),
    "groups of 8": (32, 32, (3, 3), (1, 1), (1, 1), (1, 1), 4),
    "groups of 5, strided": (15, 6, (3, 3), (2, 2), (1, 1), (1, 1), 3),
    "groups of 64, dilated": (128, 48, (3, 3), (1, 1), (2, 2), (2, 2), 2),
    "groups, pointwise": (48, 96, (1, 1), (1, 1), (0, 0), (1, 1), 3),
}


def operands(
    tools: Any,
    slots: int,
    shape: tuple[int, int, int, int],
    o: int,
    kernel: tuple[int, int],
    dtype: torch.dtype,
    groups: int = 1,
) -> tuple[Tensor, list[Tensor]]:
    x, c = tools.guarded(torch.randn(slots, *shape).to(dtype)), shape[3] // groups
    fan = c * kernel[0] * kernel[1]
    return x, [tools.guarded((torch.randn(o, *kernel, c) / fan**0.5).to(dtype)) for _ in range(slots)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", list(GEOMETRIES))
def test_matches_float64(tools: Any, name: str, dtype: torch.dtype) -> None:
    c, o, kernel, stride, padding, dilation, groups = GEOMETRIES[name]
    x, weights = operands(tools, 2, (2, 9, 8, c), o, kernel, dtype, groups)
    rows = torch.tensor([1, 0])
    arena = torch.randn(2, 2 * o)
    geometry: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    plain = reference.conv(list(x), [weights[row] for row in rows], **geometry)
    residual = torch.randn(2, *plain[0].shape).to(dtype)
    out = torch.empty(2, *plain[0].shape, dtype=dtype)
    conv(
        x, tools.table(weights), 1, rows, tools.control(2, 132), out, kernel=kernel, **geometry,
        scale=Vector(arena, 0), shift=Vector(arena, o), residual=residual, activation="relu", sms=1,
    )  # fmt: skip
    want = reference.conv(
        list(x), [weights[row] for row in rows], **geometry, scales=list(arena[rows, :o]),
        shifts=list(arena[rows, o:]), residuals=list(residual), activation="relu",
    )  # fmt: skip
    tools.close(out, torch.stack(want), dtype)


@pytest.mark.parametrize("name", ["stem", "wide, uneven", "pointwise", "groups of 8"])
def test_bits_do_not_depend_on_bundle(tools: Any, filled: Any, name: str) -> None:
    c, o, kernel, stride, padding, _, groups = GEOMETRIES[name]
    x, weights = operands(tools, 3, (1, 9, 8, c), o, kernel, torch.float16, groups)
    table = tools.table(weights)
    size = (
        out_size(9, kernel[0], stride[0], padding[0], 1),
        out_size(8, kernel[1], stride[1], padding[1], 1),
    )
    named: dict[str, Any] = {"kernel": kernel, "stride": stride, "padding": padding, "groups": groups}
    whole = filled(3, 1, *size, o, dtype=torch.float16)
    conv(x, table, 1, torch.arange(3), tools.control(3, 132), whole, sms=3, **named)
    for slot in range(3):
        alone = filled(1, 1, *size, o, dtype=torch.float16)
        conv(x[slot : slot + 1], table, 1, torch.tensor([slot]), tools.control(1, 1), alone, sms=1, **named)
        assert torch.equal(alone[0], whole[slot])
    order = torch.tensor([2, 0, 1])
    for active, cap in [(3, 1), (2, 2), (0, 132)]:
        out = filled(3, 1, *size, o, dtype=torch.float16)
        conv(x[order].contiguous(), table, 1, order, tools.control(active, cap), out, sms=2, **named)
        assert torch.equal(out[:active], whole[order][:active])
        assert bool((out[active:] == 7.0).all())


@pytest.mark.parametrize("gather", [False, True])
def test_every_class_computes_the_same_convolution(tools: Any, gather: bool) -> None:
    x, weights = operands(tools, 2, (1, 6, 7, 24), 70, (3, 3), torch.float16)
    out = torch.empty(2, 1, 6, 7, 70, dtype=torch.float16)
    conv(
        x, tools.table(weights), 1, torch.arange(2), tools.control(2, 1), out, kernel=(3, 3), padding=(1, 1),
        tile=Tile(32, 64, 32, 4, 2, 1), bit_class=BitClass(Family.WGMMA, swap=True, gather=gather),
    )  # fmt: skip
    tools.close(out, torch.stack(reference.conv(list(x), weights, padding=(1, 1))), torch.float16)


SHAPE = st.tuples(
    st.integers(1, 2), st.integers(6, 9), st.integers(6, 9), st.sampled_from([3, 16, 20]), st.integers(1, 40)
)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    shapes=st.lists(SHAPE, min_size=1, max_size=4),
    stride=st.sampled_from([(1, 1), (1, 2)]),
    groups=st.sampled_from([1, 2, 3]),
    cap=st.integers(1, 3),
    data=st.data(),
)
def test_slots_of_unequal_sizes(
    shapes: list[tuple[int, int, int, int, int]],
    stride: tuple[int, int],
    groups: int,
    cap: int,
    data: st.DataObject,
) -> None:
    active = data.draw(st.integers(0, len(shapes)))
    torch.manual_seed(len(shapes))
    shapes = [(n, h, w, c * groups, o * groups) for n, h, w, c, o in shapes]
    xs = [torch.randn(n, h, w, c) for n, h, w, c, _ in shapes]
    weights = [torch.randn(o, 3, 3, c // groups) / (9 * c) ** 0.5 for *_, c, o in shapes]
    arena = torch.randn(len(shapes), 120)
    shifts = [arena[slot, : shape[4]] for slot, shape in enumerate(shapes)]
    geometry: dict[str, Any] = {"stride": stride, "padding": (1, 1), "groups": groups}
    want = reference.conv(xs, weights, shifts=shifts, activation="hardswish", **geometry)
    x_offsets, out_offsets, x_end, out_end = [], [], 0, 0
    for each, result in zip(xs, want, strict=True):
        x_offsets.append(x_end)
        out_offsets.append(out_end)
        x_end += each.numel() + 5
        out_end += result.numel() + 3
    x, out = torch.full((x_end,), float("nan")), torch.full((out_end,), 7.0)
    for offset, each in zip(x_offsets, xs, strict=True):
        x[offset : offset + each.numel()] = each.flatten()
    geometry["kernel"] = (3, 3)
    conv(
        x, torch.tensor([[weight.data_ptr()] for weight in weights]), 0, torch.arange(len(shapes)),
        torch.tensor([active, cap], dtype=torch.int32), out, shift=Vector(arena, 0), activation="hardswish",
        problems=conv_problems(shapes, x_offsets, out_offsets, CPU, **geometry), sms=2,
        bit_class=BitClass(Family.WGMMA, gather=True, precision="tf32x3", step=32), **geometry,
    )  # fmt: skip
    written = torch.zeros(out_end, dtype=torch.bool)
    for at, result in zip(out_offsets[:active], want, strict=False):
        written[at : at + result.numel()] = True
        got = out[at : at + result.numel()].view(result.shape)
        torch.testing.assert_close(got.double(), result, rtol=1e-5, atol=1e-5)
    assert bool((out[~written] == 7.0).all())


def test_refuses_what_it_cannot_read(tools: Any) -> None:
    x, weights = operands(tools, 1, (1, 6, 6, 16), 8, (3, 3), torch.float16)
    common = (tools.table(weights), 1, torch.arange(1), tools.control(1, 1))
    with pytest.raises(ValueError, match="out must be"):
        conv(x, *common, torch.empty(1, 1, 6, 6, 8, dtype=torch.float16), kernel=(3, 3))
    with pytest.raises(ValueError, match=r"\[T, N, H, W, C\]"):
        conv(x[0], *common, torch.empty(1, 4, 4, 8, dtype=torch.float16), kernel=(3, 3))
    for tile in (Tile(64, 64, 64, 4, 3, 2, second_n=32), Tile(32, 64, 64, 4, 4, 4, swap=True)):
        with pytest.raises(ValueError, match="linear layers only"):
            conv(x, *common, torch.empty(1, 1, 4, 4, 8, dtype=torch.float16), kernel=(3, 3), tile=tile)
    with pytest.raises(ValueError, match="share a bit class"):
        conv_ragged_of_two_classes(tools)


def conv_ragged_of_two_classes(tools: Any) -> None:
    problems = conv_problems([(1, 8, 8, 16, 8), (1, 8, 8, 64, 8)], [0, 1024], [0, 512], CPU, kernel=(3, 3))
    x, out = torch.zeros(8192, dtype=torch.float16), torch.zeros(1024, dtype=torch.float16)
    table = torch.zeros(2, 1, dtype=torch.int64)
    conv(x, table, 0, torch.arange(2), tools.control(2, 1), out, kernel=(3, 3), problems=problems)

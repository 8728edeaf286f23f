"""The linear super-kernel in Triton's interpreter, against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_mux.lowering.kernels import choose, reference
from torch_mux.lowering.kernels.data import Activation, BitClass, Family, Part, Tile, Vector
from torch_mux.lowering.kernels.linear import linear, linear_launch, linear_problems

pytestmark = pytest.mark.interpreter
CPU = torch.device("cpu")


def operands(
    tools: Any, slots: int, m: int, n: int, k: int, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    x = tools.guarded(torch.randn(slots, m, k).to(dtype))
    return x, [tools.guarded((torch.randn(n, k) / k**0.5).to(dtype)) for _ in range(slots)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 64, 256), (17, 40, 72), (70, 130, 64), (5, 3, 7)])
def test_matches_float64(tools: Any, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    x, weights = operands(tools, 3, m, n, k, dtype)
    rows = torch.tensor([2, 0, 1])
    arena = torch.randn(3, 2 * n + 5)
    residual = torch.randn(3, m, n).to(dtype)
    out = torch.empty(3, m, n, dtype=dtype)
    linear(
        x, tools.table(weights), 1, rows, tools.control(3, 132), out, n=n, k=k,
        scale=Vector(arena, 5), shift=Vector(arena, 5 + n), residual=residual, activation="silu", sms=1,
    )  # fmt: skip
    want = reference.linear(
        list(x), [weights[row] for row in rows], list(arena[rows, 5 : 5 + n]), list(arena[rows, 5 + n :]),
        list(residual), "silu",
    )  # fmt: skip
    tools.close(out, torch.stack(want), dtype)


@pytest.mark.parametrize("activation", list(Activation))
def test_activations(tools: Any, activation: Activation) -> None:
    weight = torch.eye(32)
    x = torch.linspace(-9.0, 9.0, 64 * 32).view(1, 64, 32)
    x[0, 0, :4] = torch.tensor([0.0, 1e-4, -1e-4, 1e-6])
    out = torch.empty(1, 64, 32)
    linear(
        x, tools.table([weight]), 1, torch.zeros(1, dtype=torch.int64), tools.control(1, 1), out, n=32, k=32,
        activation=activation,
    )  # fmt: skip
    want = reference.activate(x.double(), activation)
    torch.testing.assert_close(out.double(), want, rtol=2e-6, atol=1e-6)
    small = (x.abs() < 0.2) & (x != 0)
    if activation is Activation.GELU:
        assert (out.double() - want).abs().max() < 3e-7  # erf in fp32 leaves 4.5e-7
        tail = (x < -3.0) & (x > -5.0)
        assert ((out.double() - want).abs() / want.abs())[tail].max() < 1e-4
    if activation is Activation.TANH:
        assert ((out.double() - want).abs() / want.abs())[small].max() < 5e-7


def test_gelu_of_what_is_not_finite(tools: Any) -> None:
    x = torch.zeros(1, 16, 16, dtype=torch.float16)
    x[0, :4, 0] = torch.tensor([float("inf"), float("-inf"), float("nan"), 6e4])
    out, one = torch.empty_like(x), torch.ones(16, 16, dtype=torch.float16)
    common = (tools.table([one]), 1, torch.zeros(1, dtype=torch.int64), tools.control(1, 1))
    linear(x, *common, out, n=16, k=16, activation="gelu")
    want = torch.zeros(1, 16, 16, dtype=torch.float16)
    want[0, :4] = torch.tensor([float("inf"), 0.0, float("nan"), 6e4], dtype=torch.float16)[:, None]
    torch.testing.assert_close(out, want, equal_nan=True)


TWO_WIDTHS = Tile(16, 32, 32, 4, 2, 2, second_n=16)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("k_major", [True, False])
@pytest.mark.parametrize("n", [96, 33, 40, 130])  # no last tile, then one of a column, of one sum, of both
def test_tiles_of_two_widths(tools: Any, filled: Any, n: int, k_major: bool, swap: bool) -> None:
    m, k, dtype = 37, 72, torch.float16
    x, weights = operands(tools, 3, m, n, k, dtype)
    stored = weights if k_major else [tools.guarded(weight.T.contiguous()) for weight in weights]
    arena, residual = torch.randn(3, 2 * n), torch.randn(3, m, n).to(dtype)
    vectors = {"scale": Vector(arena, 0), "shift": Vector(arena, n)}
    more: list[dict[str, Any]] = [{"shift": vectors["shift"]}, {**vectors, "residual": residual}]
    for named in more:
        out = filled(3, m, n, dtype=dtype)
        linear(
            x, tools.table(stored), 1, torch.arange(3), tools.control(2, 1), out, n=n, k=k,
            weight_strides=(k, 1) if k_major else (1, n), activation="gelu",
            tile=replace(TWO_WIDTHS, swap=swap), **named,
        )  # fmt: skip
        scales, residuals = (list(arena[:, :n]), list(residual)) if "scale" in named else (None, None)
        want = reference.linear(list(x), weights, scales, list(arena[:, n:]), residuals, "gelu")
        tools.close(out[:2], torch.stack(want)[:2], dtype)
        assert bool((out[2:] == 7.0).all())


@pytest.mark.parametrize("tile", [Tile(128, 64, 64, 4, 4, 2, second_n=32), Tile(128, 128, 64, 8, 3, 2)])
def test_the_largest_tiles(tools: Any, tile: Tile) -> None:
    x, weights = operands(tools, 2, 140, 200, 72, torch.float16)
    arena, out = torch.randn(2, 200), torch.empty(2, 140, 200, dtype=torch.float16)
    linear(
        x, tools.table(weights), 1, torch.arange(2), tools.control(2, 132), out, n=200, k=72,
        shift=Vector(arena, 0), activation="gelu", tile=tile,
    )  # fmt: skip
    want = reference.linear(list(x), weights, shifts=list(arena), activation="gelu")
    tools.close(out, torch.stack(want), torch.float16)


@pytest.mark.parametrize("m", [5, 32, 70])
@pytest.mark.parametrize(
    "tile", [Tile(32, 64, 128, 4, 4, 2, swap=True), Tile(32, 64, 64, 4, 4, 4, swap=True)]
)
def test_tiles_with_rows_on_the_n_side(tools: Any, filled: Any, tile: Tile, m: int) -> None:
    n, k, dtype = 136, 200, torch.float16
    x, weights = operands(tools, 3, m, n, k, dtype)
    arena, residual = torch.randn(3, n), torch.randn(3, m, n).to(dtype)
    for more in (None, residual):
        out = filled(3, m, n, dtype=dtype)
        linear(
            x, tools.table(weights), 1, torch.arange(3), tools.control(2, 1), out, n=n, k=k,
            shift=Vector(arena, 0), residual=more, activation="relu", tile=tile,
        )  # fmt: skip
        added = None if more is None else list(more)
        want = reference.linear(list(x), weights, None, list(arena), added, "relu")
        tools.close(out[:2], torch.stack(want)[:2], dtype)
        assert bool((out[2:] == 7.0).all())


@pytest.mark.parametrize("bit_class", [
    BitClass(Family.WGMMA, precision="tf32"), BitClass(Family.WGMMA, precision="tf32x3", step=64),
    BitClass(None, swap=True),
])  # fmt: skip
def test_a_tile_swaps_only_where_it_leaves_the_bits(bit_class: BitClass) -> None:
    with pytest.raises(ValueError, match="M side"):
        choose.check(Tile(32, 64, 64, 4, 4, 4, swap=True), bit_class)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_transposed_weight_with_ragged_edges(tools: Any, dtype: torch.dtype) -> None:
    x, _ = operands(tools, 2, 20, 1, 24, dtype)
    weights = [tools.guarded(torch.randn(24, 40).to(dtype)) for _ in range(2)]
    out = torch.empty(2, 20, 40, dtype=dtype)
    linear(
        x,
        tools.table(weights),
        1,
        torch.arange(2),
        tools.control(2, 4),
        out,
        n=40,
        k=24,
        weight_strides=(1, 40),
    )
    tools.close(out, torch.stack(reference.linear(list(x), [weight.T for weight in weights])), dtype)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_vectors_of_either_dtype_and_alone(tools: Any, scaled: bool, dtype: torch.dtype) -> None:
    x, weights = operands(tools, 2, 6, 16, 16, torch.float32)
    arena = torch.randn(2, 16).to(dtype)
    out = torch.empty(2, 6, 16)
    vector = {"scale" if scaled else "shift": Vector(arena, 0)}
    linear(x, tools.table(weights), 1, torch.arange(2), tools.control(2, 4), out, n=16, k=16, **vector)
    want = reference.linear(list(x), weights, **{"scales" if scaled else "shifts": list(arena)})
    tools.close(out, torch.stack(want), torch.float32)


def test_bits_do_not_depend_on_bundle(tools: Any, filled: Any) -> None:
    x, weights = operands(tools, 4, 20, 96, 40, torch.float16)
    table = tools.table(weights)
    named: dict[str, Any] = {"n": 96, "k": 40, "activation": "gelu"}
    whole = filled(4, 20, 96, dtype=torch.float16)
    linear(x, table, 1, torch.arange(4), tools.control(4, 132), whole, sms=3, **named)
    for slot in range(4):
        alone = filled(1, 20, 96, dtype=torch.float16)
        linear(x[slot : slot + 1], table, 1, torch.tensor([slot]), tools.control(1, 1), alone, sms=1, **named)
        assert torch.equal(alone[0], whole[slot])
    order = torch.tensor([3, 1, 0, 2])
    for active, cap in [(4, 1), (3, 2), (2, 132), (0, 1)]:
        out = filled(4, 20, 96, dtype=torch.float16)
        linear(x[order].contiguous(), table, 1, order, tools.control(active, cap), out, sms=3, **named)
        assert torch.equal(out[:active], whole[order][:active])
        assert bool((out[active:] == 7.0).all())


def test_weights_on_the_m_side(tools: Any) -> None:
    x, weights = operands(tools, 2, 9, 70, 24, torch.float16)
    out = torch.empty(2, 9, 70, dtype=torch.float16)
    linear(
        x, tools.table(weights), 1, torch.arange(2), tools.control(2, 1), out, n=70, k=24,
        tile=Tile(16, 64, 32, 4, 2, 1), bit_class=BitClass(Family.WGMMA, swap=True),
    )  # fmt: skip
    tools.close(out, torch.stack(reference.linear(list(x), weights)), torch.float16)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    sizes=st.lists(
        st.tuples(st.integers(17, 80), st.integers(1, 80), st.sampled_from([8, 24, 33, 64])),
        min_size=1,
        max_size=5,
    ),
    cap=st.integers(1, 3),
    data=st.data(),
)
def test_slots_of_unequal_sizes(sizes: list[tuple[int, int, int]], cap: int, data: st.DataObject) -> None:
    active = data.draw(st.integers(0, len(sizes)))
    check_ragged(sizes, active, cap)


@pytest.mark.parametrize("active", [1, 3])
def test_slots_of_unequal_sizes_in_tiles_of_two_widths(active: int) -> None:
    sizes = [(17, 96, 24), (40, 50, 33), (33, 1, 64)]
    check_ragged(sizes, active, 1, tile=Tile(64, 32, 32, 4, 3, 2, second_n=16))


def check_ragged(sizes: list[tuple[int, int, int]], active: int, cap: int, **options: Any) -> None:
    """One launch of unequal slots gives what each slot gives on its own, and writes nothing else."""
    torch.manual_seed(len(sizes))
    xs = [torch.randn(m, k) for m, _, k in sizes]
    weights = [torch.randn(n, k) for _, n, k in sizes]
    width = max(n for _, n, _ in sizes)
    arena = torch.randn(len(sizes), width)
    x_offsets, out_offsets, x_end, out_end = [], [], 0, 0
    for m, n, k in sizes:
        x_offsets.append(x_end)
        out_offsets.append(out_end)
        x_end += m * k + 5
        out_end += m * n + 3
    x, out = torch.full((x_end,), float("nan")), torch.full((out_end,), 7.0)
    for offset, each in zip(x_offsets, xs, strict=True):
        x[offset : offset + each.numel()] = each.flatten()
    table = torch.tensor([[weight.data_ptr()] for weight in weights])
    problems = linear_problems(sizes, x_offsets, out_offsets, CPU)
    control = torch.tensor([active, cap], dtype=torch.int32)
    linear(
        x, table, 0, torch.arange(len(sizes)), control, out, n=width, k=64, shift=Vector(arena, 0),
        activation="relu", problems=problems, sms=2, **options,
    )  # fmt: skip
    written = torch.zeros(out_end, dtype=torch.bool)
    for slot, (m, n, k) in enumerate(sizes[:active]):
        at = out_offsets[slot]
        written[at : at + m * n] = True
        alone = torch.empty(1, m, n)
        linear(
            xs[slot][None], table, 0, torch.tensor([slot]), torch.tensor([1, 1], dtype=torch.int32), alone,
            n=n, k=k, shift=Vector(arena, 0), activation="relu",
        )  # fmt: skip
        got = out[at : at + m * n].view(m, n)
        want = reference.linear([xs[slot]], [weights[slot]], shifts=[arena[slot, :n]], activation="relu")[0]
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(got, alone[0], rtol=1e-6, atol=1e-5)
    assert bool((out[~written] == 7.0).all())


def joint(weights: list[list[Tensor]], k_major: bool) -> tuple[Tensor, list[Part]]:
    """A table of each slot's weights, in columns that are not in order, and the parts that read them."""
    columns = [3, 0, 2][: len(weights[0])]
    table = torch.zeros(len(weights), 4, dtype=torch.int64)
    for slot, own in enumerate(weights):
        for column, weight in zip(columns, own, strict=True):
            table[slot, column] = weight.data_ptr()
    parts, offset = [], 2
    for column, weight in zip(columns, weights[0], strict=True):
        n, k = weight.shape if k_major else weight.shape[::-1]
        parts.append(Part(column, n, k if k_major else n, scale_offset=offset + 100, shift_offset=offset))
        offset += n + 1
    return table, parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("widths", "k_major", "tile"),
    [
        ((40, 40, 40), True, None),
        ((70, 8, 33), True, None),
        ((48, 16), False, None),
        ((96, 50, 33), True, Tile(64, 32, 32, 4, 2, 2, second_n=16)),
        ((48, 96), False, Tile(64, 32, 32, 4, 2, 2, second_n=16)),
    ],
)
def test_several_weights_of_one_input_give_the_bits_of_each(
    tools: Any, filled: Any, dtype: torch.dtype, widths: tuple[int, ...], k_major: bool, tile: Tile | None
) -> None:
    slots, m, k, total = 3, 19, 72, sum(widths)
    x, _ = operands(tools, slots, m, 1, k, dtype)
    weights = [
        [tools.guarded(torch.randn((n, k) if k_major else (k, n)).to(dtype)) for n in widths] for _ in x
    ]
    table, parts = joint(weights, k_major)
    arena, residual = torch.randn(slots, 300), torch.randn(slots, m, total).to(dtype)
    rows = torch.tensor([2, 0, 1])
    strides = (k, 1) if k_major else (1, parts[0].n)
    for active, cap in [(3, 132), (2, 1)]:
        out = filled(slots, m, total, dtype=dtype)
        together = linear_launch(
            x, table, 1, rows, tools.control(active, cap), out, n=total, k=k, weight_strides=strides,
            scale=Vector(arena, 0), shift=Vector(arena, 0), residual=residual, activation="relu",
            parts=parts, sms=2, tile=tile,
        )  # fmt: skip
        together.run()
        left = 0
        for part in parts:
            alone = filled(slots, m, part.n, dtype=dtype)
            linear(
                x, table, part.column, rows, tools.control(active, cap), alone, n=part.n, k=k,
                weight_strides=(k, 1) if k_major else (1, part.n), scale=Vector(arena, part.scale_offset),
                shift=Vector(arena, part.shift_offset),
                residual=residual[..., left : left + part.n].contiguous(), activation="relu", sms=1,
                tile=together.tile,
            )  # fmt: skip  # numpy's products, unlike the device's, depend on the tile
            assert torch.equal(out[..., left : left + part.n], alone)
            left += part.n
        assert bool((out[active:] == 7.0).all())


def test_refuses_what_it_cannot_read(tools: Any) -> None:
    x, weights = operands(tools, 1, 4, 8, 8, torch.float16)
    common = (tools.table(weights), 1, torch.arange(1), tools.control(1, 1))
    out = torch.empty(1, 4, 8, dtype=torch.float16)
    with pytest.raises(ValueError, match="one stride of the weight must be 1"):
        linear(x, *common, out, n=8, k=8, weight_strides=(16, 2))
    with pytest.raises(ValueError, match="fp16, bf16 or fp32"):
        linear(x, *common, out.float(), n=8, k=8)
    with pytest.raises(ValueError, match="must be contiguous"):
        linear(x.transpose(1, 2), *common, out, n=8, k=4)
    with pytest.raises(ValueError, match="do not fit"):
        linear(x, *common, out, n=9, k=8)
    with pytest.raises(ValueError, match="two or more parts must fill the 8"):
        linear(x, *common, out, n=8, k=8, parts=[Part(0, 4, 8), Part(1, 5, 8)])
    with pytest.raises(ValueError, match="outside"):
        linear(x, *common, out, n=8, k=8, tile=Tile(64, 64, 24, 4, 2, 1))
    with pytest.raises(ValueError, match="residual must be contiguous"):
        linear(x, *common, out, n=8, k=8, residual=out[:, :2])

"""Each pass on a graph of a few operations: targets, order, ``meta["val"]`` and numbers before and after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from torch_mux.lowering.graphs import fake_of

Lowered = Callable[[Any], GraphModule]


def _targets(module: GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]


def _check(module: GraphModule, function: Callable[..., Any], values: list[Tensor]) -> None:
    for node in module.graph.nodes:
        if node.op == "call_function" and isinstance(node.meta["val"], Tensor):
            assert fake_of(node).dtype.is_floating_point or fake_of(node).dtype in (torch.int64, torch.bool)
    with torch.no_grad():
        expected, (result, *_) = function(*values), _flat(module(*values))
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    output = next(node for node in module.graph.nodes if node.op == "output")
    value = fake_of(_flat(output.args[0])[0])
    assert tuple(value.shape) == tuple(expected.shape) and value.dtype == expected.dtype


def _flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _batch_norm(x: Tensor, w: Tensor, b: Tensor, m: Tensor, v: Tensor) -> Tensor:
    return F.batch_norm(x, m, v.abs(), w, b)


#: A weight copied to another memory order.
RELAID = ["aten.permute.default", "aten.clone.default", "aten.permute.default"]

#: A linear layer with no bias does not join those that have one.
LONE = ["aten.mul.Tensor", "mux.linear.default"]
SUMS = ["aten.sum.dim_IntList", "aten.sum.dim_IntList", "aten.mul.Tensor"]

CASES: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]], list[tuple[int, ...]], list[str]]] = {
    "canonicalise_drops_copies": (
        lambda x: F.dropout(x, 0.5, False).detach().clone() + 1,
        [(2, 3)],
        [],
        ["aten.add.Tensor"],
    ),
    "canonicalise_keeps_an_output_copy": (lambda x: x.clone(), [(2, 3)], [], ["aten.clone.default"]),
    "select_linear": (lambda x, w, b: F.linear(x, w, b), [(3, 4)], [(5, 4), (5,)], ["mux.linear.default"]),
    "select_linear_leading": (lambda x, w: F.linear(x, w), [(2, 3, 4)], [(5, 4)], ["mux.linear.default"]),
    "select_mm_of_plain_weight": (
        lambda x, w: x @ w,
        [(3, 4)],
        [(4, 5)],
        ["aten.t.default", "mux.linear.default"],
    ),
    "product_of_activations_stays": (lambda x, y: x @ y, [(3, 4), (4, 5)], [], ["aten.mm.default"]),
    "select_convolution": (
        lambda x, w, b: F.conv2d(x, w, b, padding=1),
        [(2, 3, 5, 5)],
        [(4, 3, 3, 3), (4,)],
        [*RELAID, "mux.convolution.default"],
    ),
    "pointwise_convolution_needs_no_copy": (
        lambda x, w: F.conv2d(x, w),
        [(2, 3, 5, 5)],
        [(4, 3, 1, 1)],
        ["mux.convolution.default"],
    ),
    "grouped_convolution": (
        lambda x, w: F.conv2d(x, w, groups=2),
        [(2, 4, 5, 5)],
        [(4, 2, 3, 3)],
        [*RELAID, "mux.convolution.default"],
    ),
    "depthwise_convolution": (
        lambda x, w: F.conv2d(x, w, groups=4),
        [(2, 4, 5, 5)],
        [(8, 1, 3, 3)],
        [*RELAID, "mux.convolution.default"],
    ),
    "three_dimensional_convolution_stays": (
        lambda x, w: F.conv3d(x, w),
        [(2, 4, 5, 5, 5)],
        [(4, 4, 3, 3, 3)],
        ["aten.convolution.default"],
    ),
    "one_dimension_becomes_two": (
        lambda x, w, b: F.relu(F.conv1d(x, w, b)),
        [(2, 4, 7)],
        [(4, 4, 3), (4,)],
        [
            "aten.unsqueeze.default",
            "aten.unsqueeze.default",
            *RELAID,
            "mux.convolution.default",
            "aten.squeeze.dim",
        ],
    ),
    "transposed_over_whole_pixels_becomes_pointwise": (
        lambda x, w, b: F.relu(F.conv_transpose2d(x, w, b, stride=2)),
        [(2, 4, 3, 5)],
        [(4, 3, 2, 2), (3,)],
        [
            "aten.reshape.default",
            "aten.permute.default",
            "aten.reshape.default",
            *RELAID,
            "aten.unsqueeze.default",
            "aten.expand.default",
            "aten.reshape.default",
            "mux.convolution.default",
            "aten.reshape.default",
            "aten.permute.default",
            "aten.reshape.default",
        ],
    ),
    "bias_after_product": (lambda x, w, b: x @ w.t() + b, [(3, 4)], [(5, 4), (5,)], ["mux.linear.default"]),
    "residual_and_activation": (
        lambda x, w: F.relu(F.linear(x, w) + x),
        [(3, 4)],
        [(4, 4)],
        ["mux.linear.default"],
    ),
    "residual_on_the_left": (lambda x, w: x + F.linear(x, w), [(3, 4)], [(4, 4)], ["mux.linear.default"]),
    "activation_first_keeps_the_addition": (
        lambda x, w: F.relu(F.linear(x, w)) + x,
        [(3, 4)],
        [(4, 4)],
        ["mux.linear.default", "aten.add.Tensor"],
    ),
    "sum_for_a_norm_is_not_rounded": (
        lambda x, w: F.layer_norm(F.linear(x, w) + x, (4,)),
        [(3, 4)],
        [(4, 4)],
        [
            "mux.linear.default",
            "aten.add.Tensor",
            "aten.native_layer_norm.default",
            "<built-in function getitem>",
        ],
    ),
    "patches_become_linear": (
        lambda x, w, b: F.conv2d(x, w, b, stride=4),
        [(2, 3, 8, 12)],
        [(5, 3, 4, 4), (5,)],
        [
            "aten.view.default",
            "aten.permute.default",
            "aten.clone.default",
            "aten.view.default",
            "aten.view.default",
            "mux.linear.default",
            "aten.view.default",
            "aten.permute.default",
        ],
    ),
    "overlapping_patches_stay": (
        lambda x, w: F.conv2d(x, w, stride=3),
        [(2, 3, 8, 12)],
        [(5, 3, 4, 4)],
        [*RELAID, "mux.convolution.default"],
    ),
    "linears_of_one_input_join": (
        lambda x, q, a, k, b, v: F.linear(x, q, a) * F.linear(x, k, b) + F.linear(x, v),
        [(2, 3, 4)],
        [(6, 4), (6,), (6, 4), (6,), (6, 4)],
        ["mux.linears.default", *["<built-in function getitem>"] * 2, *LONE],
    ),
    "weights_of_unequal_sizes_join": (
        lambda x, q, k: F.linear(x, q).sum(-1) * F.linear(x, k).sum(-1),
        [(3, 4)],
        [(6, 4), (9, 4)],
        ["mux.linears.default", *["<built-in function getitem>"] * 2, *SUMS],
    ),
    "plain_weights_join": (
        lambda x, q, k: (x @ q) * (x @ k),
        [(3, 4)],
        [(4, 6), (4, 6)],
        [
            *["aten.t.default"] * 2,
            "mux.linears.default",
            *["<built-in function getitem>"] * 2,
            "aten.mul.Tensor",
        ],
    ),
    "different_activations_do_not_join": (
        lambda x, gate, up: F.silu(F.linear(x, gate)) * F.linear(x, up),
        [(3, 4)],
        [(6, 4), (6, 4)],
        ["mux.linear.default", "mux.linear.default", "aten.mul.Tensor"],
    ),
    "what_a_kernel_reads_does_not_join": (
        lambda x, one, two, last: F.linear(F.linear(x, one), last) * F.linear(x, two),
        [(3, 4)],
        [(6, 4), (6, 4), (6, 6)],
        ["mux.linear.default", "mux.linear.default", "mux.linear.default", "aten.mul.Tensor"],
    ),
    "kernel_read_twice_is_not_fused": (
        lambda x, w: (lambda y: F.relu(y) + y)(F.linear(x, w)),
        [(3, 4)],
        [(4, 4)],
        ["mux.linear.default", "aten.relu.default", "aten.add.Tensor"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_pass(name: str, program_of: Callable[..., Any], lowered: Lowered) -> None:
    function, inputs, parameters, targets = CASES[name]
    torch.manual_seed(0)
    values = [torch.randn(shape) for shape in (*inputs, *parameters)]
    module = lowered(program_of(function, values[: len(inputs)], values[len(inputs) :]))
    assert _targets(module) == targets
    _check(module, function, values)


@pytest.mark.parametrize(
    "name", ["relu", "silu", "sigmoid", "tanh", "gelu", "hardswish", "relu6", "gelu_tanh"]
)
def test_activation_enters_the_epilogue(name: str, program_of: Callable[..., Any], lowered: Lowered) -> None:
    activation: Any = {
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
    }.get(name) or getattr(F, name)

    def function(x: Tensor, w: Tensor) -> Any:
        return activation(F.linear(x, w))

    values = [torch.randn(3, 4), torch.randn(5, 4)]
    module = lowered(program_of(function, values[:1], values[1:]))
    assert _targets(module) == ["mux.linear.default"]
    assert next(node for node in module.graph.nodes if node.op == "call_function").args[-1] == name
    _check(module, function, values)


def test_few_channels_are_padded(lowered: Lowered, monkeypatch: pytest.MonkeyPatch, program_of: Any) -> None:
    """The pass itself, on a graph whose values only say that they are on CUDA."""
    from torch_mux.lowering.passes import pad_channels
    from torch_mux.settings import Settings

    values = [torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)]
    module = lowered(program_of(lambda x, w: F.conv2d(x, w), values[:1], values[1:]))

    class OnCuda:
        device = torch.device("cuda")

    monkeypatch.setattr(pad_channels, "fake_of", lambda node: OnCuda())
    module = pad_channels.run(module, Settings())
    assert _targets(module).count("aten.constant_pad_nd.default") == 2
    kernel = next(node for node in module.graph.nodes if str(node.target) == "mux.convolution.default")
    assert tuple(fake_of(kernel.args[0]).shape) == (2, 4, 5, 5) and tuple(fake_of(kernel.args[1]).shape) == (
        4,
        4,
        3,
        3,
    )
    _check(module, lambda x, w: F.conv2d(x, w), values)


@pytest.mark.parametrize(("size", "taps", "padding", "stride", "dilation"), [
    ((9, 8), (7, 7), (3, 3), (2, 2), (1, 1)),
    ((6, 9), (3, 3), (1, 1), (2, 2), (1, 1)),
    ((8, 11), (2, 5), (0, 2), (1, 2), (2, 1)),
    ((5, 8), (1, 4), (0, 0), (1, 2), (1, 1)),
    ((5, 10), (3, 3), (0, 0), (1, 2), (1, 1)),
])  # fmt: skip
def test_the_stride_of_an_image_is_folded_into_its_channels(
    lowered: Lowered, monkeypatch: pytest.MonkeyPatch, program_of: Any, size: tuple[int, int],
    taps: tuple[int, int], padding: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int],
) -> None:  # fmt: skip
    """The pass itself, on a graph whose values only say that they are half precision on CUDA."""
    from torch_mux.lowering.passes import fold_columns
    from torch_mux.settings import Settings

    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.relu(F.conv2d(x, w, b, stride, padding, dilation))

    values = [torch.randn(2, 4, *size), torch.randn(6, 4, *taps), torch.randn(6)]
    module = lowered(program_of(function, values[:1], values[1:]))

    class OnCuda:
        device, dtype = torch.device("cuda"), torch.float16

        def is_contiguous(self) -> bool:
            return False

    monkeypatch.setattr(fold_columns, "fake_of", lambda node: OnCuda())
    module = fold_columns.run(module, Settings())
    kernel = next(node for node in module.graph.nodes if str(node.target) == "mux.convolution.default")
    x, weight, *_, steps, border = kernel.args[:7]
    columns = -(-taps[1] // 2)
    assert (steps, border) == ([stride[0], 1], [0, 0])
    assert tuple(fake_of(weight).shape) == (6, 8, taps[0], columns)
    out = tuple(fake_of(kernel).shape)
    assert tuple(fake_of(x).shape) == (2, 8, size[0] + 2 * padding[0], out[3] - 1 + columns)
    _check(module, function, values)


def test_batch_norm_enters_the_epilogue(program_of: Callable[..., Any], lowered: Lowered) -> None:
    def function(x: Tensor, w: Tensor, *norm: Tensor) -> Tensor:
        return F.relu(_batch_norm(F.conv2d(x, w, None, padding=1), *norm) + x)

    values = [torch.randn(2, 4, 5, 5), torch.randn(4, 4, 3, 3), *(torch.randn(4) for _ in range(4))]
    module = lowered(program_of(function, values[:1], values[1:]))
    targets = _targets(module)
    assert targets[-1] == "mux.convolution.default" and "aten.add.Tensor" in targets
    assert not any("batch_norm" in target or "relu" in target for target in targets)
    _check(module, function, values)


def test_batch_norm_alone_becomes_multiply_add(program_of: Callable[..., Any], lowered: Lowered) -> None:
    def function(x: Tensor, *norm: Tensor) -> Tensor:
        return F.relu(_batch_norm(F.relu(x), *norm))

    values = [torch.randn(2, 4, 5, 5), *(torch.randn(4) for _ in range(4))]
    module = lowered(program_of(function, values[:1], values[1:]))
    assert not any("batch_norm" in target for target in _targets(module))
    _check(module, function, values)


def test_equal_calls_are_made_once(program_of: Callable[..., Any], lowered: Lowered) -> None:
    def layers(x: Tensor, y: Tensor) -> Tensor:
        for _ in range(3):
            left, right = y.chunk(2)
            x = x * left.exp() + right.exp() + torch.where(y > 0, 1.0, 2.0)
        return x

    values = [torch.randn(2, 3), torch.randn(2, 3)]
    module = lowered(program_of(layers, values, []))
    counts = Counter(_targets(module))
    assert counts["aten.exp.default"] == 2 and counts["aten.where.self"] == counts["aten.gt.Scalar"] == 1
    assert counts["aten.add.Tensor"] == 6
    _check(module, layers, values)


def test_neither_outputs_nor_random_numbers_are_shared(
    program_of: Callable[..., Any], lowered: Lowered
) -> None:
    def twice(x: Tensor) -> tuple[Tensor, ...]:
        return x.exp(), x.exp(), torch.rand_like(x) + torch.rand_like(x), x.exp() + 1

    counts = Counter(_targets(lowered(program_of(twice, [torch.randn(3)], []))))
    assert counts["aten.exp.default"] == 2 and counts["aten.rand_like.default"] == 2

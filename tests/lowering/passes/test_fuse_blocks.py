"""A bottleneck's middle, its end and the next one's beginning become ``mux::block`` where shapes allow it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor
from torch.fx import GraphModule

from torch_mux.lowering.graphs import fake_of
from torch_mux.lowering.kernels import choose_block
from torch_mux.lowering.plan import compile_plan, stack_buffer
from torch_mux.lowering.program import Program
from torch_mux.settings import Settings
from torch_mux.types import TensorSpec

HALF = torch.float16
BLOCK, CONV = "mux.block.default", "mux.convolution.default"


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains are fused on the CPU too, where their meaning is three convolutions."""
    monkeypatch.setattr(choose_block, "fused_on", lambda device: True)


def norm(x: Tensor, values: Tensor) -> Tensor:
    return F.batch_norm(x, values[0], values[1], values[2], values[3])


def bottlenecks(x: Tensor, added: Tensor, w: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    """The sum, and what the next bottleneck begins with."""
    wide, last, *norms = rest
    y = F.relu(norm(F.conv2d(x, w, padding=1), norms[0]))
    summed = F.relu(norm(F.conv2d(y, wide), norms[1]) + added)
    return summed, F.relu(norm(F.conv2d(summed, last), norms[2]))


def operands(
    side: int = 32, channels: int = 64, wide: int = 256, last: int = 64, dtype: torch.dtype = HALF
) -> list[Tensor]:
    torch.manual_seed(0)
    images = [torch.randn(1, count, side, side) for count in (channels, wide)]
    shapes = [(channels, channels, 3, 3), (wide, channels, 1, 1), (last, wide, 1, 1)]
    weights = [torch.randn(shape) / (shape[1] * shape[2] * shape[3]) ** 0.5 for shape in shapes]
    norms = [torch.rand(4, count) + 0.5 for count in (channels, wide, last)]
    return [value.to(dtype) for value in (*images, *weights, *norms)]


def targets(module: GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if str(node.target) in (BLOCK, CONV)]


def test_the_golden_graph(program_of: Callable[..., Any], lowered: Callable[[Any], GraphModule]) -> None:
    def net(*args: Tensor) -> Tensor:
        x, added, *weights = args
        summed, y = bottlenecks(x, added, *weights)
        return bottlenecks(y, summed, *weights)[1]

    values = operands()
    module = lowered(program_of(net, values[:2], values[2:]))
    lines = []
    for node in module.graph.nodes:
        if node.op == "call_function" and node.name.startswith(("block", "getitem")):
            lines += [node.name, *(f"    {argument}" for argument in node.args)]
    assert_expected_inline(
        "\n".join(lines),
        """\
block_default
    arg0_1
    [permute_default_1, arg3_1, arg4_1]
    [mul_tensor, mul_tensor_2, mul_tensor_4]
    [add_tensor, add_tensor_1, add_tensor_2]
    arg1_1
getitem_16
    block_default
    0
getitem_17
    block_default
    1
block_default_1
    getitem_17
    [permute_default_1, arg3_1, arg4_1]
    [mul_tensor_6, mul_tensor_8, mul_tensor_10]
    [add_tensor_3, add_tensor_4, add_tensor_5]
    getitem_16
getitem_19
    block_default_1
    1""",
    )


@pytest.mark.parametrize("last", [64, 128])
def test_one_chain(last: int, program_of: Callable[..., Any], lowered: Callable[[Any], GraphModule]) -> None:
    values = operands(last=last)
    module = lowered(program_of(bottlenecks, values[:2], values[2:]))
    assert targets(module) == [BLOCK]
    block, *results = (node for node in module.graph.nodes if node.name.startswith(("block", "getitem")))
    assert [tuple(fake_of(node).shape) for node in results] == [(1, 256, 32, 32), (1, last, 32, 32)]
    assert all(fake_of(node).dtype == HALF and fake_of(node).stride(1) == 1 for node in results)
    assert [fake_of(node).permute(0, 2, 3, 1).is_contiguous() for node in block.args[1]] == [True] * 3
    with torch.no_grad():
        got, exact = module(*values), bottlenecks(*(value.double() for value in values))
    for one, want in zip(got, exact, strict=True):
        torch.testing.assert_close(one.double(), want, rtol=5e-3, atol=1e-2)


def test_a_branch_takes_the_sum_with_its_shortcut(
    program_of: Callable[..., Any], lowered: Callable[[Any], GraphModule]
) -> None:
    """A ResNet's first bottleneck of a stage adds what another convolution made of its input."""

    def stage(x: Tensor, *rest: Tensor) -> Any:
        short, w, wide, last, short_norm, *norms = rest
        y = F.relu(norm(F.conv2d(x, w, padding=1), norms[0]))
        y = norm(F.conv2d(y, wide), norms[1])
        return F.relu(norm(F.conv2d(F.relu(y + norm(F.conv2d(x, short), short_norm)), last), norms[2]))

    x, _, w, wide, last, *norms = operands()
    values = [x, wide.flip(0), w, wide, last, norms[1].flip(1), *norms]
    module = lowered(program_of(stage, values[:1], values[1:]))
    assert targets(module) == [CONV, BLOCK]
    with torch.no_grad():
        got, exact = module(*values), stage(*(value.double() for value in values))
    torch.testing.assert_close(got.double(), exact, rtol=5e-3, atol=1e-2)


def no_residual(x: Tensor, added: Tensor, w: Tensor, wide: Tensor, last: Tensor, *norms: Tensor) -> Tensor:
    y = F.relu(norm(F.conv2d(x, w, padding=1), norms[0]))
    return F.relu(norm(F.conv2d(F.relu(norm(F.conv2d(y, wide), norms[1])), last), norms[2])) + added[:, :64]


def middle_read_twice(x: Tensor, added: Tensor, *rest: Tensor) -> Any:
    w, wide, last, *norms = rest
    y = F.relu(norm(F.conv2d(x, w, padding=1), norms[0]))
    summed = F.relu(norm(F.conv2d(y, wide), norms[1]) + added)
    return F.relu(norm(F.conv2d(summed, last), norms[2])), y


def other_activation(x: Tensor, added: Tensor, w: Tensor, wide: Tensor, last: Tensor, *norms: Tensor) -> Any:
    y = F.silu(norm(F.conv2d(x, w, padding=1), norms[0]))
    return F.relu(norm(F.conv2d(F.relu(norm(F.conv2d(y, wide), norms[1]) + added), last), norms[2]))


def no_norm_in_the_middle(
    x: Tensor, added: Tensor, w: Tensor, wide: Tensor, last: Tensor, *norms: Tensor
) -> Any:
    y = F.relu(norm(F.conv2d(x, w, padding=1), norms[0]))
    return F.relu(norm(F.conv2d(F.relu(F.conv2d(y, wide) + added), last), norms[2]))


def strided(x: Tensor, added: Tensor, w: Tensor, wide: Tensor, last: Tensor, *norms: Tensor) -> Any:
    y = F.relu(norm(F.conv2d(x, w, padding=1), norms[0]))
    return F.relu(norm(F.conv2d(F.relu(norm(F.conv2d(y, wide), norms[1]) + added), last, stride=2), norms[2]))


@pytest.mark.parametrize(
    "function", [no_residual, middle_read_twice, other_activation, no_norm_in_the_middle, strided]
)
def test_other_graphs_stay_three_launches(
    function: Callable[..., Any], program_of: Callable[..., Any], lowered: Callable[[Any], GraphModule]
) -> None:
    values = operands()
    assert targets(lowered(program_of(function, values[:2], values[2:]))) == [CONV] * 3


@pytest.mark.parametrize(
    "other",
    [{"side": 31}, {"channels": 128}, {"wide": 128}, {"last": 32}, {"dtype": torch.float32}],
    ids=str,
)
def test_other_shapes_stay_three_launches(
    other: dict[str, Any], program_of: Callable[..., Any], lowered: Callable[[Any], GraphModule]
) -> None:
    values = operands(**other)
    assert targets(lowered(program_of(bottlenecks, values[:2], values[2:]))) == [CONV] * 3


def test_other_devices_stay_three_launches(
    program_of: Callable[..., Any], lowered: Callable[[Any], GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    values = operands()
    assert targets(lowered(program_of(bottlenecks, values[:2], values[2:]))) == [CONV] * 3


def test_a_plan_with_a_block_has_the_bits_of_one_without(
    program_of: Callable[..., Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = [operands(), [each.flip(0) for each in operands()]]
    program, results = program_of(bottlenecks, values[0][:2], values[0][2:]), []
    for kernels in ({"block": 1}, {"conv": 3}):
        if "conv" in kernels:
            monkeypatch.setattr(choose_block, "fused_on", lambda device: False)
        plan = compile_plan(program, Settings(keep_plans=False))
        assert plan.report.kernels == kernels and plan.capturable and not plan.reasons
        made = [launch.operation.kind for launch in plan.launches(3)]
        assert made == (["block"] if "block" in kernels else ["conv", "linear", "linear"])
        assert plan.report.flops == 2 * 32 * 32 * (9 * 64 * 64 + 2 * 64 * 256)
        rows = [plan.storage.bind(each[2:]) for each in values]
        for chosen in ([0, 1], [0], [1]):
            inputs = []
            for place in range(2):
                buffer = stack_buffer(TensorSpec.of(values[0][place]), len(chosen))
                for slot, index in enumerate(chosen):
                    buffer[slot].copy_(values[index][place])
                inputs.append(buffer)
            control = torch.tensor([len(chosen), 1], dtype=torch.int32)
            got = plan.run(torch.tensor([rows[index] for index in chosen]), control, inputs)
            results.append([[each[slot] for each in got] for slot in range(len(chosen))])
    (both, first, second), apart = results[:3], results[3:]
    for alone, together in zip([*first, *second], both, strict=True):
        assert all(map(torch.equal, alone, together))
    for fused, unfused in zip(results[:3], apart, strict=True):
        assert all(all(map(torch.equal, *pair)) for pair in zip(fused, unfused, strict=True))

"""On the device: depthwise slots of unequal sizes and several weights of one input give the bits of each."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torch_mux.lowering.kernels.data import Part, Vector
from torch_mux.lowering.kernels.depthwise import depthwise
from torch_mux.lowering.kernels.geometry import conv_problems
from torch_mux.lowering.kernels.linear import linear

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
PRECISIONS = [(HALF, False), (BRAIN, False), (FULL, False), (FULL, True)]


@pytest.mark.parametrize(("dtype", "tf32"), PRECISIONS)
@pytest.mark.parametrize(("m", "widths"), [(197, (768, 768, 768)), (8, (768, 256, 256)), (40, (72, 33))])
def test_several_weights_of_one_input_give_the_bits_of_each(
    gpu_tools: Any, dtype: torch.dtype, tf32: bool, m: int, widths: tuple[int, ...]
) -> None:
    slots, k, total = 4, 256, sum(widths)
    x = gpu_tools.guarded(torch.randn(slots, m, k).to(dtype))
    weights = [[gpu_tools.guarded(torch.randn(n, k).to(dtype)) for n in widths] for _ in range(slots)]
    table = torch.tensor([[weight.data_ptr() for weight in own] for own in weights], device=CUDA)
    lefts = [sum(widths[:index]) for index in range(len(widths))]
    parts = [Part(c, n, k, shift_offset=left) for c, (n, left) in enumerate(zip(widths, lefts, strict=True))]
    arena = torch.randn(slots, total, device=CUDA)
    named: dict[str, Any] = {"k": k, "activation": "gelu", "allow_tf32": tf32}
    rows = torch.tensor([2, 0, 3, 1], device=CUDA)
    for active, cap in [(4, 132), (3, 1)]:
        control = gpu_tools.control(active, cap)
        out = torch.full((slots, m, total), 7.0, dtype=dtype, device=CUDA)
        linear(x, table, 0, rows, control, out, n=total, shift=Vector(arena, 0), parts=parts, **named)
        for part, left in zip(parts, lefts, strict=True):
            alone = torch.full((slots, m, part.n), 7.0, dtype=dtype, device=CUDA)
            shift = Vector(arena, left)
            linear(x, table, part.column, rows, control, alone, n=part.n, shift=shift, **named)
            assert torch.equal(out[..., left : left + part.n], alone)


@pytest.mark.parametrize("dtype", [HALF, FULL])
def test_ragged_depthwise_gives_the_bits_of_each_slot_alone(gpu_tools: Any, dtype: torch.dtype) -> None:
    shapes = [(1, 14, 14, 64, 64), (2, 7, 9, 40, 40), (1, 28, 20, 99, 99)]
    geometry: dict[str, Any] = {"kernel": (3, 3), "padding": (1, 1)}
    xs = [torch.randn(shape[:4]).to(dtype) for shape in shapes]
    weights = [gpu_tools.guarded(torch.randn(3, 3, shape[4]).to(dtype)) for shape in shapes]
    x, x_offsets = gpu_tools.pack(xs, dtype)
    out, out_offsets = gpu_tools.pack([torch.full(each.shape, 7.0) for each in xs], dtype)
    table, rows = gpu_tools.table(weights), torch.arange(3, device=CUDA)
    problems = conv_problems(shapes, x_offsets, out_offsets, CUDA, **geometry)
    depthwise(x, table, 1, rows, gpu_tools.control(3, 5), out, problems=problems, **geometry)
    for slot, got in enumerate(gpu_tools.unpack(out, out_offsets, xs)):
        alone = torch.empty(1, *xs[slot].shape, dtype=dtype, device=CUDA)
        control = gpu_tools.control(1, 132)
        depthwise(xs[slot][None].to(CUDA), table, 1, rows[slot : slot + 1], control, alone, **geometry)
        assert torch.equal(got, alone[0])

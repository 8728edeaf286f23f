"""The attention super-kernel on a GPU: as accurate as the vendor's, the same bits alone or together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import torch_mux
from torch_mux.lowering.kernels import choose_attention, reference
from torch_mux.lowering.kernels.attention import attention
from torch_mux.lowering.kernels.choose_attention import Size

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
#: Heads, queries, keys, channels.
SIZES = [(12, 197, 197, 64), (12, 128, 128, 64), (4, 512, 512, 64), (3, 50, 1500, 32), (8, 77, 77, 80),
         (4, 100, 100, 96), (4, 130, 131, 128), (2, 1, 40, 16), (5, 7, 7, 12)]  # fmt: skip
KINDS = ["none", "keys", "whole", "causal"]


def case(
    tools: Any, slots: int, size: tuple[int, int, int, int], dtype: torch.dtype, kind: str
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """((queries, keys, values), options); a joint buffer where the lengths allow it."""
    heads, m, n, d = size
    width = heads * d
    if m == n:
        parts = torch.split(tools.guarded(torch.randn(slots, 1, m, 3 * width).to(dtype)), width, -1)
    else:
        parts = tuple(tools.guarded(torch.randn(slots, 1, rows, width).to(dtype)) for rows in (m, n, n))
    operands = tuple(part.unflatten(-1, (heads, d)).transpose(2, 3) for part in parts)
    if kind == "causal":
        return operands, {"is_causal": True}
    if kind == "none":
        return operands, {}
    mask = torch.zeros(slots, 1, 1, m if kind == "whole" else 1, n)
    mask[torch.rand(mask.shape) < 0.3] = float("-inf")
    mask[..., 0] = 0.0
    return operands, {"mask": tools.guarded(mask.to(dtype))}


def run(
    tools: Any, operands: tuple[Tensor, ...], slots: list[int], active: int, cap: int, **named: Any
) -> Tensor:
    """The results of these slots, launched together: [T, B, H, M, D]; what is not written stays 7.

    All of them in order are read where they lie, others from copies.
    """
    whole = slots == list(range(len(operands[0])))
    query, _, value = chosen = [each if whole else each[slots].contiguous() for each in operands]
    count, images, heads, m, _ = query.shape
    out = torch.full((count, images, m, heads, value.shape[-1]), 7.0, dtype=query.dtype, device=CUDA)
    if named.get("mask") is not None:
        named["mask"] = named["mask"] if whole else named["mask"][slots].contiguous()
    attention(*chosen, tools.control(active, cap), out, **named)
    return out.transpose(2, 3)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_as_accurate_as_the_vendor(
    gpu_tools: Any, size: tuple[int, int, int, int], kind: str, dtype: torch.dtype
) -> None:
    operands, named = case(gpu_tools, 2, size, dtype, kind)
    masks = None if "mask" not in named else list(named["mask"])
    want = reference.attention(*map(list, operands), masks, kind == "causal")
    exact = torch.stack(want).transpose(2, 3)
    options = {"attn_mask": named["mask"].flatten(0, 1)} if "mask" in named else named
    theirs = F.scaled_dot_product_attention(*(each.flatten(0, 1) for each in operands), **options)
    ours = error(run(gpu_tools, operands, [0, 1], 2, 132, **named), exact)
    noise = torch.finfo(dtype).eps / 8  # of errors that are little more than one rounding of few results
    assert ours <= 1.1 * error(theirs.unflatten(0, (2, 1)), exact) + noise


@pytest.mark.parametrize("dtype", [HALF, FULL])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES[:5])
def test_bits_do_not_depend_on_bundle(
    gpu_tools: Any, size: tuple[int, int, int, int], kind: str, dtype: torch.dtype
) -> None:
    operands, named = case(gpu_tools, 16, size, dtype, kind)
    whole = run(gpu_tools, operands, list(range(16)), 16, 132, **named)
    for slot in range(16):
        assert torch.equal(run(gpu_tools, operands, [slot], 1, 132, **named)[0], whole[slot])
    order = [(5 * slot + 2) % 16 for slot in range(16)]
    for active in (16, 3, 0):
        for cap in (1, 7):
            out = run(gpu_tools, operands, order, active, cap, **named)
            assert torch.equal(out[:active], whole[order][:active])
            assert bool((out[active:] == 7.0).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_bits_do_not_depend_on_tile(gpu_tools: Any, size: tuple[int, int, int, int], kind: str) -> None:
    operands, named = case(gpu_tools, 2, size, HALF, kind)
    shape = Size(size[1], size[2], size[3], size[3])
    bits = choose_attention.bit_class(shape, HALF)
    tiles = choose_attention.candidates(shape, bits, "mask" in named, kind == "causal")
    outs = [run(gpu_tools, operands, [0, 1], 2, 132, tile=tile, **named) for tile in tiles]
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_it_may_be_captured(gpu_tools: Any) -> None:
    operands, _ = case(gpu_tools, 4, SIZES[0], HALF, "none")
    want = run(gpu_tools, operands, [0, 1, 2, 3], 4, 132)
    out, control = torch.zeros_like(want.transpose(2, 3)).contiguous(), gpu_tools.control(4, 132)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attention(*operands, control, out)
        attention(*operands, control, out)
    control[0] = 2
    graph.replay()
    assert torch.equal(out.transpose(2, 3)[:2], want[:2]) and not out[2:].any()


VENDORS = [(4, 600, 160, HALF), (2, 300, 256, BRAIN), (4, 600, 64, FULL)]


@pytest.mark.parametrize(
    ("shape", "masked"),
    [*((shape, masked) for shape in VENDORS for masked in (False, True)), ((4, 385, 64, HALF), True)],
)
def test_bits_of_what_is_left_to_the_vendor(shape: tuple[int, int, int, torch.dtype], masked: bool) -> None:
    heads, length, width, dtype = shape

    class Attending(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into = torch.nn.Linear(32, 3 * heads * width)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            parts = self.into(x).unflatten(-1, (3, heads, width)).unbind(-3)
            q, k, v = (part.transpose(-2, -3) for part in parts)
            return F.scaled_dot_product_attention(q, k, v, mask if masked else None).sum(1)

    nets = [Attending().eval().to(CUDA, dtype) for _ in range(12)]
    models: list[Any] = [torch.compile(net, backend="mux", dynamic=False) for net in nets]
    inputs = [torch.randn(1, length, 32, device=CUDA, dtype=dtype) for _ in nets]
    masks = [torch.zeros(1, 1, 1, length, device=CUDA, dtype=dtype) for _ in nets]
    for number, mask in enumerate(masks):
        mask[..., length - 20 * number :] = torch.finfo(dtype).min  # all are seen by the first
    with torch.inference_mode():
        together = torch_mux.gather(*zip(models, inputs, masks, strict=True))
        for model, x, mask, answer, net in zip(models, inputs, masks, together, nets, strict=True):
            assert torch.equal(torch_mux.gather((model, x, mask))[0], answer)
            assert error(answer, net.double()(x.double(), mask.double())) < 0.02
            net.to(dtype)
    (program,) = torch_mux.explain().programs
    assert program.coalesced and "attention" not in str(program).split("operations")[0]

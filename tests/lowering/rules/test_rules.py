"""One operation a case: the batched graph's operations, shapes and dtypes, and each slot's numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


@dataclass(frozen=True)
class Case:
    """``targets``: operations that the batched graph must contain, in this order."""

    name: str
    function: Callable[..., Any]
    inputs: tuple[tuple[int, ...] | str, ...]
    parameters: tuple[tuple[int, ...], ...] = ()
    targets: tuple[str, ...] = ()
    exact: bool = field(default=True)


# name, function, input, weights
TRANSPOSED: tuple[tuple[Any, ...], ...] = (
    ("up", lambda x, w, b: F.conv_transpose2d(x, w, b, 2), (2, 3, 4, 5), (3, 4, 2, 2), (4,)),
    ("up_overlapping", lambda x, w, b: F.conv_transpose2d(x, w, b, 2, 1), (2, 3, 4, 5), (3, 4, 4, 4), (4,)),
    ("up_odd", lambda x, w: F.conv_transpose2d(x, w, None, 2, 1, 1), (2, 3, 4, 5), (3, 4, 3, 3)),
    (
        "up_oblong",
        lambda x, w: F.conv_transpose2d(x, w, None, (3, 2), (4, 0), (2, 1), 1, (1, 2)),
        (2, 3, 4, 5),
        (3, 4, 5, 2),
    ),
    ("up_sparse", lambda x, w: F.conv_transpose2d(x, w, None, 3), (2, 3, 4, 5), (3, 4, 2, 1)),
    ("up_by_one", lambda x, w: F.conv_transpose2d(x, w, None, 1, 1), (2, 3, 4, 5), (3, 4, 3, 3)),
    ("up_grouped", lambda x, w: F.conv_transpose2d(x, w, None, 2, 1, 0, 2), (2, 6, 4, 5), (6, 2, 4, 4)),
    ("up_depthwise", lambda x, w: F.conv_transpose2d(x, w, None, 2, 1, 0, 6), (2, 6, 4, 5), (6, 1, 4, 4)),
    ("up_1d", lambda x, w, b: F.conv_transpose1d(x, w, b, 4, 2), (2, 3, 9), (3, 4, 8), (4,)),
    (
        "up_residual",
        lambda x, w, b: F.relu(F.conv_transpose2d(x, w, b, 2, 1, 1) + x.repeat(1, 1, 2, 2).flip(2)),
        (2, 3, 4, 5),
        (3, 3, 3, 3),
        (3,),
    ),
)

CASES = [
    # Element-wise.
    Case("add_rank", lambda x, y: x + y, ((2, 3, 4), (4,)), targets=("aten.add.Tensor",)),
    Case("add_parameter", lambda x, w: x + w, ((2, 3),), ((3,),), ("aten.index.Tensor", "aten.add.Tensor")),
    Case("scalar_parameter", lambda x, w: x * w, ((2, 3),), ((),), ("aten.mul.Tensor",)),
    Case(
        "where",
        lambda x, y: torch.where(x > 0, x, y),
        ((2, 3), (3,)),
        targets=("aten.gt.Scalar", "aten.where.self"),
    ),
    Case("gelu", F.gelu, ((2, 3),), targets=("aten.erf.default",), exact=False),
    Case("hardswish", F.hardswish, ((2, 3),), exact=False),
    Case("to_half", lambda x: x.half(), ((2, 3),)),
    Case("masked_fill", lambda x: x.masked_fill(x > 0, -1.0), ((2, 3),)),
    Case("fmod", lambda x: torch.fmod(x, 0.3), ((2, 3),)),
    Case("full_like", lambda x: x + torch.full_like(x, 2.0), ((2, 3),)),
    Case("constant", lambda x: x + torch.arange(3), ((2, 3),), targets=("aten.add.Tensor",)),
    Case("relu6", F.relu6, ((2, 3),)),
    # Shapes.
    Case("view", lambda x: x.view(6, 2) + 0, ((2, 3, 2),), targets=("aten.view.default",)),
    Case("view_after_permute", lambda x: x.permute(2, 0, 1).reshape(4, 6) + 0, ((2, 3, 4),)),
    Case("expand", lambda x: x.expand(5, 2, 3) + 0, ((2, 3),), targets=("aten.expand.default",)),
    Case("transpose", lambda x: x.transpose(-1, 0) + 0, ((2, 3, 4),)),
    Case("t", lambda x: x.t() + 0, ((2, 3),)),
    Case("squeeze", lambda x: x.squeeze(1).unsqueeze(-1) + 0, ((2, 1, 4),)),
    Case("select", lambda x: x.select(-1, 1) + 0, ((2, 3, 4),)),
    Case("slice", lambda x: x[:, 1:3] + 0, ((2, 5),)),
    Case("slice_first", lambda x: x[1:] + 0, ((2, 5),)),
    Case("split", lambda x: x.split(2, -1)[1] + 0, ((2, 6),)),
    Case("chunk", lambda x: sum(x.chunk(3, 0)), ((6, 2),)),
    Case("unbind", lambda x: x.unbind(0)[1] + 0, ((2, 6),)),
    Case("flip", lambda x: x.flip(0) + 0, ((2, 6),)),
    Case("roll", lambda x: x.roll(1, 1) + 0, ((2, 6),)),
    Case("repeat", lambda x: x.repeat(3, 1, 2), ((2, 6),)),
    Case("pad", lambda x: F.pad(x, (1, 2)), ((2, 6),), targets=("aten.constant_pad_nd.default",)),
    Case("tril", lambda x: x.tril(), ((4, 4),), exact=True),
    Case(
        "cat",
        lambda x, w: torch.cat([x, w], 0),
        ((2, 3),),
        ((1, 3),),
        ("aten.index.Tensor", "aten.cat.default"),
    ),
    Case("stack", lambda x, y: torch.stack([x, y], -1), ((2, 3), (2, 3))),
    Case("clone", lambda x: x.transpose(0, 1).contiguous(), ((2, 3),)),
    # Reductions.
    Case("mean", lambda x: x.mean((0, -1)), ((2, 3, 4),), targets=("aten.mean.dim",), exact=False),
    Case("mean_all", lambda x: x.mean(), ((2, 3, 4),), exact=False),
    Case("sum_keepdim", lambda x: x.sum(1, keepdim=True), ((2, 3, 4),), exact=False),
    Case("amax", lambda x: x.amax(-1), ((2, 3),)),
    Case("max_dim", lambda x: x.max(0)[0], ((2, 3),)),
    Case("argmax", lambda x: x.argmax(-1), ((2, 3),)),
    Case("argmax_all", lambda x: x.argmax(), ((2, 3),)),
    Case("max_all", lambda x: x.max(), ((2, 3),)),
    Case("any_all", lambda x: (x > 0).any(), ((2, 3),)),
    Case("var", lambda x: x.var(1), ((2, 7),), exact=False),
    Case("cumsum", lambda x: x.cumsum(0), ((4, 3),), exact=False),
    Case("softmax", lambda x: x.softmax(-1), ((2, 7),), exact=False),
    Case("log_softmax", lambda x: x.log_softmax(0), ((4, 7),), exact=False),
    Case("topk", lambda x: x.topk(2)[0], ((2, 7),)),
    Case("norm", lambda x: torch.linalg.vector_norm(x, dim=1), ((2, 7),), exact=False),
    # Normalisation.
    Case(
        "layer_norm",
        lambda x, w, b: F.layer_norm(x, (8,), w, b),
        ((2, 3, 8),),
        ((8,), (8,)),
        ("aten.var_mean.correction", "aten.rsqrt.default", "aten.index.Tensor", "aten.mul.Tensor"),
        exact=False,
    ),
    Case("layer_norm_plain", lambda x: F.layer_norm(x, (3, 8)), ((2, 3, 8),), exact=False),
    Case("group_norm", lambda x, w, b: F.group_norm(x, 2, w, b), ((2, 4, 3, 3),), ((4,), (4,)), exact=False),
    # Images.
    Case("max_pool", lambda x: F.max_pool2d(x, 2), ((2, 3, 4, 4),)),
    Case("avg_pool", lambda x: F.avg_pool2d(x, 3, 1, 1), ((2, 3, 4, 4),), exact=False),
    Case("adaptive", lambda x: F.adaptive_avg_pool2d(x, 2), ((2, 3, 5, 5),), exact=False),
    Case("upsample", lambda x: F.interpolate(x, scale_factor=2), ((2, 3, 4, 4),)),
    Case("bilinear", lambda x: F.interpolate(x, (7, 7), mode="bilinear"), ((2, 3, 4, 4),), exact=False),
    Case("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), ((2, 4, 3, 3),)),
    Case("reflection", lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), ((2, 3, 4, 4),)),
    # Products of activations and attention.
    Case("bmm", torch.bmm, ((2, 3, 4), (2, 4, 5)), targets=("mux.slot_bmm.default",), exact=False),
    Case("mm", torch.mm, ((3, 4), (4, 5)), targets=("mux.slot_bmm.default",), exact=False),
    Case("mm_odd", torch.mm, ((9, 32), (32, 9)), targets=("mux.slot_bmm.default",), exact=False),
    Case("baddbmm", torch.baddbmm, ((3, 5), (2, 3, 4), (2, 4, 5)), exact=False),
    Case("addmm_activations", torch.addmm, ((5,), (3, 4), (4, 5)), exact=False),
    Case(
        "attention",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        ((2, 2, 5, 8),) * 3,
        targets=("mux.slot_attention.default",),
        exact=False,
    ),
    Case(
        "attention_mask",
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
        ((2, 2, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8), (2, 1, 5, 5)),
        exact=False,
    ),
    # Reads by index.
    Case(
        "embedding", lambda i, w: F.embedding(i, w), ("indices",), ((7, 5),), ("mux.slot_embedding.default",)
    ),
    Case("index_constant", lambda x: x[:, torch.tensor([2, 0])], ((2, 3),), targets=("aten.index.Tensor",)),
    Case(
        "index_unsafe",
        lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
        ((1, 2, 3, 4),),
        targets=("aten._unsafe_index.Tensor",),
        exact=False,
    ),
    Case("index_slotted", lambda x, i: x[i], ((7, 2), "indices"), targets=("aten.index.Tensor",)),
    Case(
        "index_slotted_beside_constant",
        lambda x, i: x[torch.arange(4), i.argmax(-1)],
        ((4, 7, 3), "indices"),
        targets=("aten.index.Tensor",),
    ),
    Case("index_slotted_of_parameter", lambda i, w: w[i, i[:, :1]], ("indices",), ((7, 7, 2),)),
    Case("index_select", lambda x: x.index_select(0, torch.tensor([1, 1, 0])), ((2, 3),)),
    Case("gather", lambda x, i: x.gather(1, i), ((4, 7), "indices"), targets=("aten.gather.default",)),
    # Super-kernels.
    Case(
        "linear",
        lambda x, w, b: F.linear(x, w, b),
        ((3, 4),),
        ((5, 4), (5,)),
        ("mux.slot_linear.default",),
        False,
    ),
    Case(
        "linear_3d", lambda x, w: F.linear(x, w), ((2, 3, 4),), ((5, 4),), ("mux.slot_linear.default",), False
    ),
    Case("mm_weight", lambda x, w: x @ w, ((3, 4),), ((4, 5),), ("mux.slot_linear.default",), False),
    Case(
        "linears",
        lambda x, q, a, k, b: F.linear(x, q, a).sum(-1) * F.linear(x, k, b).sum(-1),
        ((2, 3, 5),),
        ((7, 5), (7,), (3, 5), (3,)),
        ("mux.slot_linear.default", "aten.split_with_sizes.default"),
        False,
    ),
    Case(
        "conv",
        lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1),
        ((2, 3, 6, 6),),
        ((4, 3, 3, 3), (4,)),
        ("mux.slot_convolution.default",),
        False,
    ),
    Case(
        "conv_dilated",
        lambda x, w: F.conv2d(x, w, dilation=2),
        ((2, 3, 6, 6),),
        ((4, 3, 3, 3),),
        ("mux.slot_convolution.default",),
        False,
    ),
    *(
        Case(name, function, (x,), weights, ("mux.slot_convolution.default",), False)
        for name, function, x, *weights in (
            ("depthwise", lambda x, w, b: F.conv2d(x, w, b, 2, 1, 1, 6), (2, 6, 7, 5), (6, 1, 3, 3), (6,)),
            ("multiplier", lambda x, w: F.conv2d(x, w, None, 1, 2, 2, 6), (2, 6, 7, 5), (12, 1, 3, 3)),
            ("grouped", lambda x, w, b: F.conv2d(x, w, b, 1, 1, 1, 2), (2, 6, 7, 5), (4, 3, 3, 3), (4,)),
            ("conv1d", lambda x, w, b: F.conv1d(x, w, b, 2, 3, 2), (2, 6, 19), (4, 6, 3), (4,)),
            ("conv1d_depthwise", lambda x, w: F.conv1d(x, w, None, 1, 3, 1, 6), (2, 6, 9), (6, 1, 7)),
            *TRANSPOSED,
        )
    ),
]


def _draw(shape: tuple[int, ...] | str, generator: torch.Generator) -> Tensor:
    if isinstance(shape, str):
        return torch.randint(0, 7, (4, 2), generator=generator)
    return torch.randn(shape, generator=generator)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule(case: Case, batched: Callable[..., Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    slots = 3
    requests = [[_draw(shape, generator) for shape in case.inputs] for _ in range(slots)]
    weights = [[torch.randn(shape, generator=generator) for shape in case.parameters] for _ in range(slots)]
    lowered = batched(case.function, requests[0], weights[0])
    assert lowered.reasons == []
    remaining = iter(lowered.targets)
    assert all(target in remaining for target in case.targets), lowered.targets
    with torch.no_grad():
        results = lowered.run(requests, weights)
        alone = [
            lowered.run([request], [weight])[0] for request, weight in zip(requests, weights, strict=True)
        ]
        for slot in range(slots):
            expected = case.function(*requests[slot], *weights[slot])
            assert torch.equal(results[slot][0], alone[slot][0])
            tolerance = 0.0 if case.exact else 1e-5
            torch.testing.assert_close(results[slot][0], expected, rtol=tolerance, atol=tolerance)


def test_rms_norm_rule() -> None:
    """Traced on the CPU it is many operations, so its rule is asked directly."""
    from torch_mux.lowering.rules import Context, Slotted, rule_for

    graph = torch.fx.Graph()
    target = aten._fused_rms_norm.default
    node = graph.call_function(target, ())
    x, weight = torch.randn(3, 2, 8), torch.randn(3, 8)
    node.meta["val"] = (x[0], None)
    context = Context(3, torch.arange(3), torch.zeros(2), torch.zeros(0), {}, {}, {}, "", (False, False))
    result = rule_for(target)(context, node, (Slotted(x), [8], Slotted(weight), 1e-5), {})[0].tensor
    for slot in range(3):
        torch.testing.assert_close(result[slot], F.rms_norm(x[slot], (8,), weight[slot], 1e-5))


REFUSED = [
    ("roll_flat", lambda x: x.roll(1), ((2, 6),), "roll over flattened"),
    ("slotted_index", lambda x, i: x[:, i], ((2, 7), "indices"), "differs a slot, behind a dimension"),
    ("fft", lambda x: torch.fft.rfft(x).abs(), ((8,),), "aten._fft_r2c"),
]


@pytest.mark.parametrize(
    ("function", "inputs", "text"), [case[1:] for case in REFUSED], ids=[c[0] for c in REFUSED]
)
def test_no_rule_is_a_typed_reason(
    function: Callable[..., Any], inputs: tuple[Any, ...], text: str, batched: Callable[..., Any]
) -> None:
    generator = torch.Generator().manual_seed(0)
    lowered = batched(function, [_draw(shape, generator) for shape in inputs])
    assert lowered.reasons and text in " ".join(lowered.reasons)


def test_a_size_that_depends_on_data_has_no_program(batched: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="symbolic shapes"):
        batched(lambda x, y: x[y > 0], [torch.randn(4), torch.randn(4)])

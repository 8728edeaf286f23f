"""Compiled plans: numbers, segments, and the same bits at every slot count."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torch_mux.lowering.kernels import ahead
from torch_mux.lowering.kernels.code import Code
from torch_mux.lowering.plan import CompiledPlan, compile_plan, stack_buffer
from torch_mux.lowering.program import Program
from torch_mux.settings import Settings
from torch_mux.types import FallbackKind


def _cnn(
    x: Tensor, w1: Tensor, w2: Tensor, m: Tensor, v: Tensor, g: Tensor, b: Tensor, head: Tensor
) -> Tensor:
    y = F.relu(F.batch_norm(F.conv2d(x, w1, padding=1), m, v, g, b))
    y = F.relu(F.conv2d(F.max_pool2d(y, 2), w2) + 1)
    return F.linear(y.mean((2, 3)), head)


def _encoder(
    i: Tensor, e: Tensor, p: Tensor, qkv: Tensor, up: Tensor, down: Tensor, g: Tensor, b: Tensor
) -> Tensor:
    x = F.embedding(i, e) + p
    q, k, v = (
        t.view(2, 5, 2, 8).transpose(1, 2) for t in F.linear(F.layer_norm(x, (16,), g, b), qkv).chunk(3, -1)
    )
    x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 16)
    return x + F.linear(F.gelu(F.linear(x, up)), down)


def _mixed(x: Tensor, w: Tensor, volume: Tensor, point: Tensor) -> Tensor:
    y = F.conv3d(F.relu(F.conv2d(x, w)).unsqueeze(1), volume, padding=(1, 0, 0)).squeeze(1)
    return F.hardswish(F.conv2d(y, point)).mean((2, 3))


def _mobile(
    x: Tensor, wide: Tensor, each: Tensor, down: Tensor, up: Tensor, narrow: Tensor, shift: Tensor
) -> Tensor:
    y = F.hardswish(F.conv2d(x, wide))
    y = F.relu6(F.conv2d(y, each, shift, padding=1, groups=12))
    gate = F.hardsigmoid(F.conv2d(F.relu(F.conv2d(y.mean((2, 3), keepdim=True), down)), up))
    return (x + F.conv2d(y * gate, narrow)).mean((2, 3))


def _u_net(x: Tensor, down: Tensor, grouped: Tensor, up: Tensor, wave: Tensor) -> Tensor:
    y = F.relu(F.conv2d(x, down, stride=2))
    y = F.relu(F.conv2d(y, grouped, padding=1, groups=3))
    y = F.conv_transpose2d(y, up, stride=2) + x
    return F.conv1d(y.flatten(2), wave, padding=2).mean(2)


SHAPES: dict[str, tuple[Callable[..., Tensor], Any, list[tuple[int, ...]]]] = {
    "cnn": (
        _cnn,
        lambda: torch.randn(2, 3, 8, 8),
        [(4, 3, 3, 3), (6, 4, 1, 1), (4,), (4,), (4,), (4,), (5, 6)],
    ),
    "encoder": (
        _encoder,
        lambda: torch.randint(0, 9, (2, 5)),
        [(9, 16), (5, 16), (48, 16), (32, 16), (16, 32), (16,), (16,)],
    ),
    "mixed": (_mixed, lambda: torch.randn(1, 3, 8, 8), [(4, 3, 3, 3), (1, 1, 3, 3, 3), (5, 4, 1, 1)]),
    "mobile": (
        _mobile,
        lambda: torch.randn(1, 4, 7, 7),
        [(12, 4, 1, 1), (12, 1, 3, 3), (3, 12, 1, 1), (12, 3, 1, 1), (4, 12, 1, 1), (12,)],
    ),
    "u_net": (
        _u_net,
        lambda: torch.randn(2, 3, 6, 6),
        [(9, 3, 2, 2), (6, 3, 3, 3), (6, 3, 2, 2), (5, 3, 5)],
    ),
}


def _run(plan: CompiledPlan, requests: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    spec = plan.program.inputs[0]
    assert spec is not None
    buffer = stack_buffer(spec, len(requests))
    for slot, request in enumerate(requests):
        buffer[slot].copy_(request)
    with torch.inference_mode():
        control = torch.tensor([len(requests), 1], dtype=torch.int32)
        return plan.run(torch.tensor(list(rows)), control, [buffer])[0].clone()


@pytest.mark.parametrize("name", SHAPES)
def test_plan(name: str, program_of: Callable[..., Program]) -> None:
    function, draw, shapes = SHAPES[name]
    torch.manual_seed(0)
    instances = [[torch.randn(shape).abs() + 0.1 for shape in shapes] for _ in range(5)]
    requests = [draw() for _ in range(5)]
    plan = compile_plan(program_of(function, [requests[0]], instances[0]), Settings())
    assert plan.coalesced and plan.max_slots >= 64
    expected_segments = {"mixed": ("coalesced", "per instance", "coalesced")}.get(name, ("coalesced",))
    assert plan.report.segments == expected_segments
    assert plan.capturable == (name != "mixed")
    assert [reason.kind for reason in plan.reasons] == ([FallbackKind.NO_RULE] if name == "mixed" else [])
    rows = [plan.storage.bind(instance) for instance in instances]
    alone = [_run(plan, [requests[k]], [rows[k]])[0] for k in range(5)]
    for k in range(5):
        torch.testing.assert_close(alone[k], function(requests[k], *instances[k]), rtol=1e-4, atol=1e-5)
    chooser = random.Random(0)
    for _ in range(12):
        chosen = [chooser.randrange(5) for _ in range(chooser.randint(1, 17))]
        together = _run(plan, [requests[k] for k in chosen], [rows[k] for k in chosen])
        assert all(torch.equal(together[slot], alone[k]) for slot, k in enumerate(chosen))


@pytest.mark.parametrize("width", [16, 20])
def test_joined_linears_give_the_bits_of_each_alone(
    width: int, program_of: Callable[..., Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch_mux.lowering import passes

    def layer(x: Tensor, q: Tensor, qb: Tensor, k: Tensor, kb: Tensor, v: Tensor, vb: Tensor) -> Tensor:
        heads = (F.linear(x, w, b).view(2, 5, 2, -1).transpose(1, 2) for w, b in ((q, qb), (k, kb), (v, vb)))
        return F.scaled_dot_product_attention(*heads)

    torch.manual_seed(0)
    shapes = [(width, 12), (width,)] * 3
    instances = [[torch.randn(shape) for shape in shapes] for _ in range(3)]
    requests = [torch.randn(2, 5, 12) for _ in range(3)]
    program, plans = program_of(layer, [requests[0]], instances[0]), []
    joins = {"joined linear": 1, "attention": 1}
    for kernels in (joins, {"linear": 3, "attention": 1}):
        if kernels is not joins:
            kept = tuple(step for step in passes.PASSES if step is not passes.join_siblings.run)
            monkeypatch.setattr(passes, "PASSES", kept)
        plans.append(compile_plan(program, Settings()))
        assert plans[-1].report.kernels == kernels and plans[-1].capturable
    results = []
    for plan in plans:
        rows = [plan.storage.bind(instance) for instance in instances]
        together = _run(plan, requests, rows)
        for request, row, result in zip(requests, rows, together, strict=True):
            assert torch.equal(_run(plan, [request], [row])[0], result)
        results.append(together)
    assert torch.equal(*results)
    for request, instance, result in zip(requests, instances, results[0], strict=True):
        torch.testing.assert_close(result, layer(request, *instance), rtol=1e-4, atol=1e-5)


def test_whole_program_runs_alone(program_of: Callable[..., Program]) -> None:
    program = program_of(lambda x, w: (x.view(4), w[0]), [torch.randn(2, 2)], [torch.randn(2, 3)])
    plan = compile_plan(program, Settings())
    assert not plan.coalesced and plan.reasons[0].kind is FallbackKind.ALIASED_OUTPUT
    x, w = torch.randn(2, 2), torch.randn(2, 3)
    with torch.no_grad():
        view, row = plan.run_alone([w], [x])
    torch.testing.assert_close(view, x.view(4))
    torch.testing.assert_close(row, w[0])


def test_failed_lowering_is_a_reason_not_a_failure(
    program_of: Callable[..., Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch_mux.lowering.plan as module

    def broken(*_: object) -> None:
        raise RuntimeError("broken pass")

    monkeypatch.setattr(module, "run_passes", broken)
    x, w = torch.randn(2, 4), torch.randn(4, 4)
    plan = compile_plan(program_of(lambda x, w: (x @ w,), [x], [w]), Settings())
    assert not plan.coalesced and plan.reasons[0].kind is FallbackKind.COMPILE_FAILED
    assert "broken pass" in plan.reasons[0].detail
    with torch.no_grad():
        torch.testing.assert_close(plan.run_alone([w], [x])[0], x @ w)


def test_precision_of_half(program_of: Callable[..., Program]) -> None:
    """fp16 and bf16 with the epilogue in float32: no worse than eager against float64."""
    for dtype in (torch.float16, torch.bfloat16):
        torch.manual_seed(0)
        x, w, b = (
            torch.randn(4, 64, dtype=dtype),
            torch.randn(32, 64, dtype=dtype),
            torch.randn(32, dtype=dtype),
        )
        plan = compile_plan(program_of(lambda x, w, b: F.gelu(F.linear(x, w, b)), [x], [w, b]), Settings())
        result = _run(plan, [x], [plan.storage.bind([w, b])])[0]
        exact = F.gelu(F.linear(x.double(), w.double(), b.double()))
        error = (result.double() - exact).norm() / exact.norm()
        eager = (F.gelu(F.linear(x, w, b)).double() - exact).norm() / exact.norm()
        assert error <= 1.1 * eager


def test_the_first_sizes_kernels_are_kept_with_a_plan(
    program_of: Callable[..., Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    function, make, shapes = SHAPES["encoder"]
    weights = [torch.randn(shape) for shape in shapes]
    plan = compile_plan(program_of(function, [make()], weights), Settings())
    begun: list[Any] = []
    monkeypatch.setattr(ahead, "builder", SimpleNamespace(begin=begun.extend))
    (step,) = plan._steps
    assert step.recipe.kernels is not None
    assert step.recipe.kernels.begin(torch.device("cpu")) == {} and not begun
    ready = pickle.loads(pickle.dumps(step.recipe.kernels.begin(torch.device("cuda"))))
    assert sorted(ready) == [1, 2, 16] and len(begun) == sum(map(len, ready.values()))
    kept = CompiledPlan(
        plan.program,
        plan.reasons,
        plan.report,
        plan.storage,
        (replace(step, recipe=replace(step.recipe, ready=ready)),),
        plan._outputs,
        None,
    )
    for slots in (1, 2, 16, 3):
        known, asked = kept.launches(slots), plan.launches(slots)
        assert all(isinstance(one, Code) == (slots != 3) for one in known)
        assert {one.variant for one in known} == {one.variant for one in asked}


def test_a_plan_tells_what_it_launches_at_every_size(program_of: Callable[..., Program]) -> None:
    expected = {
        "cnn": ["conv_kernel", "linear_kernel", "linear_kernel"],
        "encoder": ["attention_kernel", "embedding_kernel"] + ["linear_kernel"] * 3,
    }
    for name, names in expected.items():
        function, make, shapes = SHAPES[name]
        weights = [torch.randn(shape) for shape in shapes]
        plan = compile_plan(program_of(function, [make()], weights), Settings())
        for slots in (1, 2, 16, 7):
            launches = plan.launches(slots)
            assert sorted(launch.kernel.__name__ for launch in launches) == names
            for launch in launches:
                assert launch.arguments["slots"] == launch.arguments["out"].shape[0] == slots
                assert launch.grid > 0 and launch.variant

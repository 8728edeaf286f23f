"""Programs and their identity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from torch_mux import state
from torch_mux.lowering.capture import capture
from torch_mux.lowering.program import Program
from torch_mux.types import FallbackKind


def _programs() -> list[Program]:
    engine = state.engine()
    return sorted(
        (served.program for served in engine._served.values()), key=lambda program: program.fingerprint
    )


class _First(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))  # type: ignore[no-any-return]


class _Same(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 8)
        self.tail = nn.Sequential(nn.ReLU(), nn.Linear(8, 3))

    def forward(self, anything: Tensor) -> Tensor:
        return self.tail(self.head(anything))  # type: ignore[no-any-return]


def _run(*models: nn.Module, mode: Callable[[], Any] = torch.no_grad) -> None:
    for model in models:
        with mode():
            x = torch.randn(2, 4)
            torch.testing.assert_close(torch.compile(model.eval(), backend="mux")(x), model(x))


def test_two_classes_with_the_same_graph_share_a_program() -> None:
    _run(_First(), _Same())
    assert len(_programs()) == 1


def test_another_width_is_another_program() -> None:
    _run(_First(8), _First(9))
    assert len(_programs()) == 2


def test_no_grad_and_inference_mode_land_on_one_program() -> None:
    model = _First()
    _run(model)
    torch._dynamo.reset()
    _run(model, mode=torch.inference_mode)
    assert len(_programs()) == 1


@pytest.mark.parametrize(
    "other", [{"shape": (3, 4)}, {"dtype": torch.float64}, {"value": 2.0}, {"tied": True}]
)
def test_identity(other: dict[str, Any], program_of: Callable[..., Program]) -> None:
    def make(
        shape: tuple[int, ...] = (2, 4), dtype: Any = torch.float32, value: float = 1.0, tied: bool = False
    ) -> str:
        x, w, v = (
            torch.randn(shape, dtype=dtype),
            torch.randn(4, 4, dtype=dtype),
            torch.randn(4, 4, dtype=dtype),
        )
        if tied:
            return program_of(lambda x, w: (x @ w + value) @ w, [x], [w]).fingerprint
        return program_of(lambda x, w, v: (x @ w + value) @ v, [x], [w, v]).fingerprint

    assert make() == make() != make(**other)


def test_constants_count_by_value() -> None:
    class Scaled(nn.Module):
        def __init__(self, values: list[float]) -> None:
            super().__init__()
            self.values = values

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.tensor(self.values)

    x = torch.ones(2)
    with torch.no_grad():
        for values in ([1.0, 2.0], [1.0, 2.0], [1.0, 3.0]):
            assert torch.compile(Scaled(values), backend="mux")(x).tolist() == values
    assert len(_programs()) == 2


def test_precision_settings_count(program_of: Callable[..., Program]) -> None:
    def make() -> str:
        return program_of(torch.mm, [torch.randn(2, 4)], [torch.randn(4, 4)]).fingerprint

    before, allowed = make(), torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = not allowed
        assert make() != before
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def test_mutated_buffer_runs_per_instance() -> None:
    class Counter(nn.Module):
        steps: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.steps += 1
            return x * self.steps

    first, second = Counter(), Counter()
    fast_first, fast_second = (torch.compile(model, backend="mux") for model in (first, second))
    with torch.no_grad():
        for step in (1.0, 2.0, 3.0):
            assert fast_first(torch.ones(2)).tolist() == [step, step]
        assert fast_second(torch.ones(2)).tolist() == [1.0, 1.0]
    (program,) = _programs()
    assert program.mutates and program.fallback is not None
    assert program.fallback.kind is FallbackKind.MUTATES_INPUT
    assert first.steps.item() == 3.0 and second.steps.item() == 1.0


def test_random_operations_leave_the_rest_coalesced(batched: Callable[..., Any]) -> None:
    lowering = batched(lambda x: (x * 2 + torch.rand_like(x)).relu(), [torch.randn(2)], [])
    assert lowering.program.fallback is None
    assert lowering.reasons == ["aten.rand_like.default: draws random numbers"]


def test_outputs_that_share_storage_are_made_outside(program_of: Callable[..., Program]) -> None:
    program = program_of(lambda x: (x.view(4), x * 2), [torch.randn(2, 2)], [])
    assert program.fallback is None and program.outputs[0] is None and program.hidden == 0
    assert (
        program.derived[0] is not None and program.derived[0].kind == "input" and program.derived[1] is None
    )
    program = program_of(lambda x: (x.exp().t(), x.exp()[0] * 2, x.exp()), [torch.randn(2, 2)], [])
    assert program.fallback is None and not program.hidden and not any(program.derived)


def test_views_are_part_of_the_identity(program_of: Callable[..., Program]) -> None:
    def make(row: int) -> str:
        return program_of(lambda x: (x * 2, x[row]), [torch.randn(2, 2)], []).fingerprint

    assert make(0) == make(0) != make(1)


def test_a_graph_of_views_alone_runs_per_instance(program_of: Callable[..., Program]) -> None:
    program = program_of(lambda x: x.view(4), [torch.randn(2, 2)], [])
    assert program.fallback is not None and program.fallback.kind is FallbackKind.ALIASED_OUTPUT


def test_split_and_join_are_inverse(program_of: Callable[..., Program]) -> None:
    program = program_of(lambda x, y, w: x @ w + y, [torch.randn(2, 4), torch.randn(4)], [torch.randn(4, 4)])
    args = [object(), object(), object()]
    assert program.join(*program.split(args)) == args


def _on_a_gpu(function: Callable[..., Any]) -> Program:
    """``function`` of an input [3, 4] and a parameter [4, 4] on a GPU that need not be there."""
    with FakeTensorMode(), torch.no_grad():
        x, weight = torch.empty(3, 4, device="cuda"), torch.empty(4, 4, device="cuda")
        graph = make_fx(function)(x, weight)
    return capture(graph, [1], "case")


def _distances() -> Tensor:
    place = torch.arange(4)
    return (place[:, None] - place[None, :]).abs()


def test_constants_that_are_made_on_the_cpu_and_moved_do_not_span_devices() -> None:
    program = _on_a_gpu(lambda x, weight: x @ weight.take(_distances().to(x.device)))
    assert program.fallback is None and program.device.type == "cuda"


@pytest.mark.parametrize(
    "function",
    [
        lambda x, weight: (x @ weight, _distances()),
        lambda x, weight: (x @ weight, x.to("cpu") + 1),
        lambda x, weight: x @ weight + _distances()[0].to(x.device),
    ],
    ids=["returned", "of the input", "beside the input"],
)
def test_what_stays_on_another_device_spans_devices(function: Callable[..., Any]) -> None:
    fallback = _on_a_gpu(function).fallback
    assert fallback is not None and fallback.kind is FallbackKind.SUBCLASS and "spans" in fallback.detail

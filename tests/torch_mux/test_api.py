"""gather, submit and the rest, on the real engine."""

from __future__ import annotations

import asyncio
import gc
import threading
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_mux
from torch_mux import calls, state
from torch_mux.api import Warmup
from torch_mux.errors import (
    ClosedError,
    DeviceMismatch,
    ExecutionFailed,
    InvalidRequest,
    InvalidSetting,
    ModelRemoved,
    NotCompiled,
    UnknownOption,
    UnparsableQuantity,
)


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.fc1 = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.fc2 = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.norm(torch.relu(self.fc1(x))))
        return out


class Counting(Net):
    """Stays on the guarded path."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return super().forward(x)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def make(count: int, kind: type[Net] = Net) -> list[Any]:
    with torch.inference_mode(False):
        return [torch.compile(kind(seed).eval(), backend="mux", dynamic=False) for seed in range(count)]


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def bundles() -> dict[int, int]:
    return dict(torch_mux.stats().sizes)


def test_gather_answers_in_order_and_learns() -> None:
    models = make(3)
    for _ in range(3):
        inputs = [torch.randn(2, 8) for _ in models]
        answers = torch_mux.gather(*zip(models, inputs, strict=True))
        assert isinstance(answers, tuple)
        for model, x, y in zip(models, inputs, answers, strict=True):
            close(y, model._orig_mod(x))
            assert y.is_inference()
    assert bundles()[3] == 2
    assert all(calls.prepare(model, (torch.randn(2, 8),), {}).route is not None for model in models)


def test_gather_takes_one_model_several_times_and_nothing_at_all() -> None:
    (model,) = make(1)
    x, y = torch.randn(2, 8), torch.randn(2, 8)
    first, second = torch_mux.gather((model, x), (model, y))
    close(first, model._orig_mod(x))
    close(second, model._orig_mod(y))
    assert torch_mux.gather() == ()


def test_gather_is_bitwise_what_a_plain_call_gives() -> None:
    models = make(4)
    inputs = [torch.randn(2, 8) for _ in models]
    alone = [model(x) for model, x in zip(models, inputs, strict=True)]
    for _ in range(2):
        for one, other in zip(torch_mux.gather(*zip(models, inputs, strict=True)), alone, strict=True):
            assert torch.equal(one, other)


def test_guarded_models_of_one_round_still_share_a_bundle() -> None:
    models = make(4, Counting)
    torch_mux.configure(max_wait="50ms")
    for round_ in range(3):
        inputs = [torch.randn(2, 8) for _ in models]
        answers = torch_mux.gather(*zip(models, inputs, strict=True))
        for model, x, y in zip(models, inputs, answers, strict=True):
            close(y, Net.forward(model._orig_mod, x))
            assert model._orig_mod.count == round_ + 1
    assert max(bundles()) > 1


def test_gather_attributes_requests_to_the_quota() -> None:
    learned, guarded = make(1)[0], make(2, Counting)
    x = torch.randn(2, 8)
    with torch_mux.quota("alice"):
        for _ in range(2):
            torch_mux.gather((learned, x), *[(model, x) for model in guarded])
    tenants = torch_mux.stats().tenants
    assert set(tenants) == {"alice"} and tenants["alice"].ok == 6


def test_the_first_error_comes_after_all_others_are_done() -> None:
    (model,) = make(1)
    x = torch.randn(2, 8)
    torch_mux.gather((model, x))
    before = torch_mux.stats().tenants["default"].ok
    with pytest.raises(RuntimeError, match="fake tensor call"):
        torch_mux.gather((model, torch.randn(2, 9)), (model, x), (model, [x]), (model, x))
    assert torch_mux.stats().tenants["default"].ok == before + 2


def test_gather_rejects_what_is_not_a_request() -> None:
    (model,) = make(1)
    with pytest.raises(InvalidRequest, match="request 1"):
        torch_mux.gather((model, torch.randn(2, 8)), model)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="empty"):
        torch_mux.gather(())


@pytest.mark.parametrize(
    "other",
    [Net(), torch.compile(Net()), torch.compile(lambda x: x), len, 3],
    ids=["a module", "another backend", "a function", "a builtin", "a number"],
)
def test_needs_a_model_compiled_with_mux(other: Any) -> None:
    for function in (lambda: torch_mux.gather((other, 1)), lambda: torch_mux.submit(other, 1)):
        with pytest.raises(NotCompiled, match='backend="mux"'):
            function()
    for named in (torch_mux.refresh, torch_mux.remove):
        with pytest.raises(NotCompiled):
            named(other)


def test_takes_functions_and_models_compiled_in_place() -> None:
    with torch.inference_mode(False):
        net, place = Net().eval(), Net(1).eval()
        place.compile(backend="mux")
        function = torch.compile(lambda x: net(x) * 2, backend="mux")
    x = torch.randn(2, 8)
    for _ in range(2):
        doubled, y = torch_mux.gather((function, x), (place, x))
        close(doubled, net(x) * 2)
        close(y, Net.forward(place, x))


def test_an_input_on_another_device() -> None:
    (model,) = make(1)
    elsewhere = torch.empty(2, 8, device="meta")
    for function in (
        lambda: torch_mux.gather((model, elsewhere)),
        lambda: torch_mux.submit(model, elsewhere).result(),
    ):
        with pytest.raises(DeviceMismatch, match="input 0 of Net is on meta"):
            function()


def test_submit_in_threads_and_callbacks() -> None:
    models = make(3)
    x = torch.randn(2, 8)
    for _ in range(2):
        seen: list[bool] = []
        futures = [torch_mux.submit(model, x) for model in models]
        for model, future in zip(models, futures, strict=True):
            future.add_done_callback(lambda done, seen=seen: seen.append(done.done()))
            close(future.result(timeout=60), model._orig_mod(x))
            assert future.done() and future.exception() is None and not future.cancel()
        assert seen == [True] * 3


def test_submit_takes_keywords() -> None:
    (model,) = make(1)
    x = torch.randn(2, 8)
    for _ in range(2):
        close(torch_mux.submit(model, x=x).result(), model._orig_mod(x))


def test_submit_is_awaitable_and_keeps_the_quota() -> None:
    models = make(4)
    x = torch.randn(2, 8)

    async def client(model: Any, tenant: str) -> Tensor:
        with torch_mux.quota(tenant):
            for _ in range(3):
                answer: Tensor = await torch_mux.submit(model, x)
        return answer

    async def everybody() -> list[Tensor]:
        return await asyncio.gather(*[client(model, f"t{index}") for index, model in enumerate(models)])

    for model, y in zip(models, asyncio.run(everybody()), strict=True):
        close(y, model._orig_mod(x))
    tenants = torch_mux.stats().tenants
    assert {name: got.ok for name, got in tenants.items()} == {f"t{index}": 3 for index in range(4)}


def test_an_error_comes_out_of_the_future() -> None:
    (model,) = make(1)
    future = torch_mux.submit(model, torch.randn(2, 9))
    assert isinstance(future.exception(), Exception)
    with pytest.raises(RuntimeError):
        future.result()


def test_a_timeout_leaves_the_request_alone() -> None:
    (model,) = make(1)
    x = torch.randn(2, 8)
    model(x)
    torch_mux.gather((model, x))
    release = threading.Event()
    with state.engine().compile_lock:
        slow = torch_mux.submit(make(1, Counting)[0], x)
        with pytest.raises(TimeoutError):
            slow.result(timeout=0.05)
        release.set()
    assert slow.result(timeout=120).shape == (2, 4)


def test_modes_and_quota_reach_the_pool() -> None:
    with torch.inference_mode(False):
        model = torch.compile(Counting().eval(), backend="mux", dynamic=False)
        x = torch.randn(2, 8)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch_mux.quota("carol"):
            answer = torch_mux.submit(model, x).result()
    assert answer.dtype is torch.bfloat16 and not answer.is_inference() and not answer.requires_grad
    assert torch_mux.stats().tenants["carol"].ok == 1


def test_a_rebound_weight_is_used_at_once() -> None:
    models = make(2)
    x = torch.randn(2, 8)
    pairs = [(model, x) for model in models]
    for _ in range(2):
        torch_mux.gather(*pairs)
    with torch.inference_mode(False):
        models[0].fc2.weight = nn.Parameter(torch.zeros(4, 16))
        models[1]._orig_mod.load_state_dict(Net(7).state_dict(), assign=True)
    for _ in range(2):
        for model, y in zip(models, torch_mux.gather(*pairs), strict=True):
            close(y, model._orig_mod(x))
    close(torch_mux.submit(models[1], x).result(), Net(7)(x))


def test_a_weight_written_in_place_is_used_at_once() -> None:
    (model,) = make(1)
    x = torch.randn(2, 8)
    for _ in range(2):
        torch_mux.gather((model, x))
    with torch.inference_mode(False), torch.no_grad():
        model._orig_mod.fc1.weight.mul_(2)
        model._orig_mod.norm.bias.add_(1)
    (y,) = torch_mux.gather((model, x))
    close(y, model._orig_mod(x))


def test_a_model_moved_to_another_dtype_is_learned_again() -> None:
    (model,) = make(1)
    for _ in range(2):
        torch_mux.gather((model, torch.randn(2, 8)))
    with torch.inference_mode(False):
        model.double()
    x = torch.randn(2, 8, dtype=torch.float64)
    for _ in range(2):
        (y,) = torch_mux.gather((model, x))
        close(y, model._orig_mod(x))


def test_refresh_sees_data_writes() -> None:
    (model,) = make(1)
    x = torch.randn(2, 8)
    for _ in range(2):
        torch_mux.gather((model, x))
    model._orig_mod.norm.weight.data.mul_(3)
    torch_mux.refresh(model)
    (y,) = torch_mux.gather((model, x))
    close(y, model._orig_mod(x))


def test_remove_and_refresh() -> None:
    model, other = make(2)
    x = torch.randn(2, 8)
    torch_mux.gather((model, x), (other, x))
    torch_mux.remove(model)
    ways = (
        lambda: torch_mux.gather((model, x)),
        lambda: torch_mux.submit(model, x).result(),
        lambda: model(x),
    )
    for function in ways:
        with pytest.raises(ModelRemoved, match="refresh"):
            function()
    close(torch_mux.gather((other, x))[0], other._orig_mod(x))
    torch_mux.refresh(model)
    close(torch_mux.gather((model, x))[0], model._orig_mod(x))


def test_close_and_reset() -> None:
    (model,) = make(1)
    x = torch.randn(2, 8)
    torch_mux.gather((model, x))
    torch_mux.close()
    for function in (lambda: torch_mux.gather((model, x)), lambda: model(x)):
        with pytest.raises(ClosedError, match="reset"):
            function()
    torch_mux.reset()
    for _ in range(2):
        close(torch_mux.gather((model, x))[0], model._orig_mod(x))


def test_warmup_makes_bundle_sizes_ready() -> None:
    (model,) = make(1)
    done = torch_mux.warmup(model, torch.randn(2, 8), sizes=(1, 3))
    assert isinstance(done, Warmup) and done.learned and "ready" in str(done)
    assert set(bundles()) == {1, 3}
    with pytest.raises(InvalidSetting, match="sizes"):
        torch_mux.warmup(model, torch.randn(2, 8), sizes=(0,))
    torch_mux.configure(max_bundle=4)
    with pytest.raises(InvalidSetting, match="max_bundle=4"):
        torch_mux.warmup(model, torch.randn(2, 8), sizes=(1, 5))


def test_configure() -> None:
    assert torch_mux.configure(max_wait="200us", max_bundle=16).max_wait == pytest.approx(200e-6)
    assert torch_mux.configure(linger=0.001).max_bundle == 16
    with pytest.raises(UnknownOption, match="max_wait"):
        torch_mux.configure(max_weit=1)
    with pytest.raises(UnparsableQuantity):
        torch_mux.configure(max_wait="soon")
    for wrong in ({"max_bundle": 0}, {"lanes": 1.5}, {"enabled": "no"}, {"isolation": "hard"}):
        with pytest.raises(InvalidSetting):
            torch_mux.configure(**wrong)
    torch_mux.reset()
    assert torch_mux.configure().max_bundle != 16


def test_configure_disabled_sends_new_graphs_to_inductor() -> None:
    torch_mux.configure(enabled=False)
    (model,) = make(1)
    x = torch.randn(2, 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        close(torch_mux.gather((model, x))[0], model._orig_mod(x))
    assert not caught
    assert "disabled" in str(torch_mux.explain())


def test_an_exception_in_one_model_stays_there() -> None:
    models = make(2)
    x = torch.randn(2, 8)
    for _ in range(2):
        torch_mux.gather(*[(model, x) for model in models])
    broken = calls.prepare(models[0], (x,), {}).route
    assert broken is not None
    broken.instance.served.plan.run = lambda *_: (_ for _ in ()).throw(ValueError("boom"))
    with pytest.raises(ExecutionFailed, match="boom"):
        torch_mux.gather((models[0], x))


def test_a_model_can_be_collected() -> None:
    (model,) = make(1)
    x = torch.randn(2, 8)
    for _ in range(3):
        torch_mux.gather((model, x))
        torch_mux.submit(model, x).result()
    gone = weakref.ref(model._orig_mod.fc1.weight)
    del model
    gc.collect()
    assert gone() is None

"""submit_all: several requests sent off at once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_mux
from torch_mux.errors import (
    CancelledRequest,
    ExecutionFailed,
    InvalidQuota,
    InvalidRequest,
    NotCompiled,
    Overloaded,
)
from torch_mux.runtime.dispatch import Dispatcher


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.inner, self.out = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(torch.relu(self.inner(x)))
        return out


class Counting(Net):
    """Stays on the guarded path."""

    count = 0

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


def test_answers_are_those_of_plain_calls_and_come_from_one_bundle() -> None:
    models, x = make(3), torch.randn(2, 8)
    alone = [model(x) for model in models]
    torch_mux.gather(*((model, x) for model in models))
    before = torch_mux.stats()
    futures = torch_mux.submit_all(*((model, x) for model in models))
    for future, answer in zip(futures, alone, strict=True):
        assert torch.equal(future.result(), answer)
    after = torch_mux.stats()
    assert (after.requests - before.requests, after.bundles - before.bundles) == (3, 1)


def test_each_request_has_the_quota_that_is_given_with_it() -> None:
    (model,), x = make(1), torch.randn(2, 8)
    torch_mux.submit(model, x).result()
    alice, bob = torch_mux.quota("alice"), torch_mux.quota(weight=2.0)
    with torch_mux.quota("outer", priority=1):
        for future in torch_mux.submit_all((alice, model, x), (model, x), (bob, model, x), (bob, model, x)):
            future.result()
        assert torch_mux.current_quota().tenant == "outer"
    tenants = torch_mux.stats().tenants
    assert (tenants["alice"].ok, tenants["outer"].ok, tenants["outer"].weight) == (1, 3, 2.0)
    bob.update(weight=3.0)
    torch_mux.submit_all((bob, model, x))[0].result()
    assert torch_mux.stats().tenants["default"].weight == 3.0


def test_the_first_call_and_guarded_models_come_from_a_thread_under_their_quota() -> None:
    plain, counting = make(1)[0], make(1, Counting)[0]
    x = torch.randn(2, 8)
    carol = torch_mux.quota("carol")
    futures = torch_mux.submit_all((plain, x), (carol, counting, x))
    assert torch.equal(futures[0].result(), plain(x))
    torch.testing.assert_close(futures[1].result(), counting._orig_mod(x), rtol=1e-5, atol=1e-6)
    assert torch_mux.stats().tenants["carol"].ok == 1


def test_one_that_is_refused_leaves_the_others() -> None:
    models, x = make(2), torch.randn(2, 8)
    torch_mux.gather(*((model, x) for model in models))
    tight = torch_mux.quota("tight", max_pending=1)
    first, *others = torch_mux.submit_all((models[0], x), *[(tight, models[1], x)] * 40)
    assert torch.equal(first.result(), models[0](x))
    errors = [future.exception() for future in others]
    assert errors[0] is None
    assert any(isinstance(error, Overloaded) for error in errors)
    tenant = torch_mux.stats().tenants["tight"]
    assert tenant.ok == errors.count(None)
    assert tenant.refused == len(errors) - errors.count(None)


def test_the_future_of_who_is_refused_has_ended_at_once(caplog: pytest.LogCaptureFixture) -> None:
    models, x = make(1), torch.randn(2, 8)
    torch_mux.gather((models[0], x))
    futures = torch_mux.submit_all(*[(torch_mux.quota("tight", max_pending=1), models[0], x)] * 40)
    refused = [future for future in futures if isinstance(future.exception(), Overloaded)]
    one, other = refused[:2]
    called: list[Any] = []
    one.add_done_callback(called.append)
    one.add_done_callback(lambda future: called[9])
    assert called == [one] and one.done() and not one.cancel()
    assert "IndexError" in caplog.text, "what a callback raises is logged, and nobody else's affair"
    with pytest.raises(Overloaded):
        other.result(timeout=0.0)

    async def awaiting() -> None:
        await other

    with pytest.raises(Overloaded):
        asyncio.run(awaiting())


def test_an_error_of_one_is_its_futures() -> None:
    models, x = make(2), torch.randn(2, 8)
    torch_mux.gather(*((model, x) for model in models))
    good, bad = torch_mux.submit_all((models[0], x), (models[1], torch.randn(2, 9)))
    assert torch.equal(good.result(), models[0](x))
    with pytest.raises((ExecutionFailed, RuntimeError)):
        bad.result()


def test_what_is_no_request_is_named_before_anything_goes_out() -> None:
    (model,), x = make(1), torch.randn(2, 8)
    torch_mux.submit(model, x).result()
    before = torch_mux.stats().requests
    for wrong in (model, (), (torch_mux.quota("a"),)):
        with pytest.raises(InvalidRequest, match=r"request 1.*submit_all also \(quota, model"):
            torch_mux.submit_all((model, x), wrong)  # type: ignore[arg-type]
    with pytest.raises(NotCompiled):
        torch_mux.submit_all((model, x), (Net(), x))
    with torch_mux.quota(sms=0.5), pytest.raises(InvalidQuota, match="reserve"):
        torch_mux.submit_all((model, x), (torch_mux.quota(reserve=0.8), model, x))
    assert torch_mux.stats().requests == before
    assert torch_mux.submit_all() == ()


def test_futures_can_be_awaited_cancelled_and_called_back() -> None:
    models, x = make(4), torch.randn(2, 8)
    answers = torch_mux.gather(*((model, x) for model in models))

    async def ask() -> list[Tensor]:
        return list(await asyncio.gather(*torch_mux.submit_all(*((model, x) for model in models))))

    assert all(map(torch.equal, asyncio.run(ask()), answers))
    torch_mux.configure(max_wait="200ms")
    told: list[Any] = []
    futures = torch_mux.submit_all(*((model, x) for model in models))
    for future in futures:
        future.add_done_callback(told.append)
    taken_back = futures[1].cancel()
    for index, future in enumerate(futures):
        if index == 1 and taken_back:
            with pytest.raises(CancelledRequest):
                future.result()
        else:
            assert torch.equal(future.result(), answers[index])
    assert set(told) == set(futures)


def test_a_changed_weight_is_used_at_once() -> None:
    models, x = make(2), torch.randn(2, 8)
    torch_mux.gather(*((model, x) for model in models))
    with torch.inference_mode(False), torch.no_grad():
        models[0]._orig_mod.out.bias.add_(1.0)
    models[1]._orig_mod.inner = Net(7).inner
    answers = [future.result() for future in torch_mux.submit_all(*((model, x) for model in models))]
    for model, answer in zip(models, answers, strict=True):
        torch.testing.assert_close(answer, model._orig_mod(x), rtol=1e-5, atol=1e-6)


class Scaled(Net):
    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        return super().forward(x) * scale


def test_an_argument_that_is_left_out_is_another_call() -> None:
    (model,), x = make(1, Scaled), torch.randn(2, 8)
    once, twice = model(x, 3.0), model(x)
    for _ in range(3):
        assert torch.equal(torch_mux.submit(model, x, 3.0).result(), once)
        assert torch.equal(torch_mux.submit(model, x).result(), twice)
        assert torch.equal(torch_mux.gather((model, x, 3.0))[0], once)
        assert torch.equal(torch_mux.gather((model, x))[0], twice)


def test_a_held_request_goes_out_in_time_though_its_caller_sent_the_others_out() -> None:
    torch_mux.configure(max_bundle=2, max_wait=0, linger=0)
    models, x = make(2), torch.randn(2, 8)
    slow = torch_mux.quota("slow", rate=5.0, burst=1)
    for model in models:
        torch_mux.submit(model, x).result()
    requests = [(models[index % 2], x) for index in range(20)]
    for future in torch_mux.submit_all(*requests, *[(slow, models[0], x)] * 2):
        future.result(timeout=5.0)


def test_an_interrupt_behind_the_queue_takes_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    (model,), x = make(1), torch.randn(2, 8)
    torch_mux.submit(model, x).result()

    def interrupted(dispatcher: Dispatcher, refused: bool) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Dispatcher, "_kicked", interrupted)
        with pytest.raises(KeyboardInterrupt):
            torch_mux.submit(model, x)
    assert torch_mux.stats().tenants["default"].pending == 1
    torch_mux.submit(model, x).result()
    assert torch_mux.stats().tenants["default"].pending == 0

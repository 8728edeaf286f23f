"""Many users at once: first calls from many threads, asyncio tasks under quotas, cancelled futures."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_mux
from subjects import bundle_sizes
from torch_mux import CancelledRequest, backend
from torch_mux.lowering import capture, plan

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
THREADS, MODELS = 16, 40


def fresh_net() -> type[nn.Module]:
    """A class that Dynamo has not seen yet."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))  # type: ignore[no-any-return]

    return Net


def compiled(count: int, device: str, net: type[nn.Module] | None = None) -> list[Any]:
    net = fresh_net() if net is None else net
    return [torch.compile(net().eval().to(device), backend="mux", dynamic=False) for _ in range(count)]


def pictures(count: int, device: str) -> list[Tensor]:
    return [torch.randn(1, 3, 8, 8, device=device) for _ in range(count)]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often graphs were captured and plans compiled."""
    counts: Counter[str] = Counter()
    lock = threading.Lock()
    for module, name in ((capture, "capture"), (plan, "compile_plan"), (backend, "_capture")):
        original = getattr(module, name)

        def counting(*args: Any, name: str = name, original: Any = original) -> Any:
            with lock:
                counts[name] += 1
            return original(*args)

        monkeypatch.setattr(module, name, counting)
    torch_mux.reset()
    return counts


@pytest.mark.parametrize("way", ["call", "gather", "submit"])
@pytest.mark.parametrize("device", DEVICES)
def test_forty_models_first_called_from_sixteen_threads(device: str, way: str, counted: Counter[str]) -> None:
    models, inputs = compiled(MODELS, device), pictures(MODELS, device)
    gate = threading.Barrier(THREADS)

    def client(worker: int) -> list[tuple[int, Tensor]]:
        mine = range(worker, MODELS, THREADS)
        with torch.inference_mode(), torch_mux.quota(f"worker {worker}"):
            gate.wait()
            if way == "gather":
                return list(zip(mine, torch_mux.gather(*[(models[i], inputs[i]) for i in mine])))
            if way == "submit":
                futures = [torch_mux.submit(models[i], inputs[i]) for i in mine]
                return list(zip(mine, [future.result(timeout=120) for future in futures]))
            return [(i, models[i](inputs[i])) for i in mine]

    with ThreadPoolExecutor(THREADS) as pool:
        found = [pool.submit(client, worker) for worker in range(THREADS)]
        answers = dict(pair for done in found for pair in done.result(timeout=300))
    with torch.inference_mode():
        for index, (model, x) in enumerate(zip(models, inputs)):
            torch.testing.assert_close(answers[index], model._orig_mod(x), rtol=1e-3, atol=1e-4)
    assert counted == {"_capture": 1, "capture": 1, "compile_plan": 1}
    (program,) = torch_mux.explain().programs
    assert program.coalesced and program.instances == MODELS and program.status == "ready"
    assert not torch_mux.explain().notes
    tenants = torch_mux.stats().tenants
    assert sum(tenant.ok for tenant in tenants.values()) == MODELS and len(tenants) == THREADS
    with torch.inference_mode():
        for _ in range(2):
            before = bundle_sizes().get(MODELS, 0)
            together = torch_mux.gather(*zip(models, inputs))
        assert bundle_sizes()[MODELS] == before + 1
    assert all(torch.equal(one, answers[index]) for index, one in enumerate(together))
    assert counted == {"_capture": 1, "capture": 1, "compile_plan": 1}


@pytest.mark.parametrize("device", DEVICES)
def test_awaiting_under_quotas_from_many_tasks(device: str) -> None:
    models, inputs = compiled(8, device), pictures(8, device)

    @torch_mux.quota("background", sms=0.25)
    async def background(index: int) -> Tensor:
        return await torch_mux.submit(models[index], inputs[index])  # type: ignore[no-any-return]

    async def client(index: int) -> list[Tensor]:
        answers = []
        with torch_mux.quota(f"tenant {index % 4}", sms=0.5):
            for _ in range(5):
                answers.append(await torch_mux.submit(models[index], inputs[index]))
                await asyncio.sleep(0)
                answers.append(await background(index))
                assert torch_mux.current_quota().tenant == f"tenant {index % 4}"
        return answers

    async def everybody() -> list[list[Tensor]]:
        return list(await asyncio.gather(*[client(index) for index in range(8)]))

    with torch.inference_mode():
        alone = torch_mux.gather(*zip(models, inputs))
        torch_mux.reset()
        torch_mux.configure(max_wait="2ms")
        for answers, expected in zip(asyncio.run(everybody()), alone):
            assert len(answers) == 10
            assert all(torch.equal(answer, expected) and answer.is_inference() for answer in answers)
    tenants = torch_mux.stats().tenants
    assert {name: tenant.ok for name, tenant in tenants.items()} == {
        "background": 40,
        **{f"tenant {index}": 10 for index in range(4)},
    }
    assert max(bundle_sizes()) > 1


@pytest.mark.parametrize("device", DEVICES)
def test_a_cancelled_future(device: str) -> None:
    (model, other), (x, y) = compiled(2, device), pictures(2, device)
    with torch.inference_mode(), torch_mux.quota("alice"):
        alone = torch_mux.gather((model, x), (other, y))
        torch_mux.configure(max_wait="10s", max_bundle=3)
        first, second, third = (torch_mux.submit(model, x) for _ in range(3))
        assert all(torch.equal(future.result(timeout=60), alone[0]) for future in (first, second, third))
        assert not first.cancel()
        kept, dropped = torch_mux.submit(model, x), torch_mux.submit(other, y)
        assert not dropped.done() and dropped.cancel() and dropped.done() and not dropped.cancel()
        for _ in range(2):
            with pytest.raises(CancelledRequest, match="'alice' was cancelled"):
                dropped.result(timeout=60)
        assert isinstance(dropped.exception(), CancelledRequest)
        assert not kept.done()
        torch_mux.configure(max_wait=0.0)
        assert torch.equal(kept.result(timeout=60), alone[0])
    assert torch_mux.stats().tenants["alice"].cancelled == 1
    assert torch_mux.stats().tenants["alice"].ok == 6


def test_a_cancelled_task_takes_its_request_back() -> None:
    (model, other), (x, y) = compiled(2, "cpu"), pictures(2, "cpu")

    async def scene() -> Tensor:
        dropped = asyncio.ensure_future(_awaited(model, x))
        kept = asyncio.ensure_future(_awaited(other, y))
        await asyncio.sleep(0.05)
        assert not dropped.done() and not kept.done()
        dropped.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dropped
        torch_mux.configure(max_wait=0.0)
        return await kept

    with torch.inference_mode(), torch_mux.quota("bob"):
        alone = torch_mux.gather((model, x), (other, y))
        torch_mux.configure(max_wait="30s")
        assert torch.equal(asyncio.run(scene()), alone[1])
    tenant = torch_mux.stats().tenants["bob"]
    assert (tenant.cancelled, tenant.pending, tenant.errors) == (1, 0, 0)


async def _awaited(model: Any, x: Tensor) -> Tensor:
    return await torch_mux.submit(model, x)  # type: ignore[no-any-return]


def test_an_awaited_error_and_a_timeout() -> None:
    (model,), (x,) = compiled(1, "cpu"), pictures(1, "cpu")

    async def scene() -> None:
        with pytest.raises(torch_mux.ModelRemoved):
            await torch_mux.submit(model, x)
        torch_mux.refresh(model)
        await torch_mux.submit(model, x)
        torch_mux.configure(max_wait="30s")
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(_awaited(model, x), 0.05)

    with torch.inference_mode():
        torch_mux.gather((model, x))
        torch_mux.remove(model)
        asyncio.run(scene())
    assert torch_mux.stats().tenants["default"].cancelled == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cancelled", [False, True])
def test_the_end_does_not_wait_for_companions(device: str, cancelled: bool) -> None:
    (model,), (x,) = compiled(1, device), pictures(1, device)
    with torch.inference_mode():
        (alone,) = torch_mux.gather((model, x))
        torch_mux.configure(max_wait="20s")
        future = torch_mux.submit(model, x)
        time.sleep(0.05)
        assert future.cancel() if cancelled else not future.done()
        start = time.monotonic()
        torch_mux.close()
        assert time.monotonic() - start < 5
        if not cancelled:
            assert torch.equal(future.result(timeout=1), alone)

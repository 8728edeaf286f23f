"""Requests end without the garbage collector: nothing that they leave refers to itself, nor do errors."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from simulated_gpu import Timing, simulated_engine
from torch import nn

import torch_mux
from torch_mux import compat, state

_N = 40
x = torch.randn(1, 4)


@pytest.fixture(params=["cpu", "simulated"])
def models(request: pytest.FixtureRequest) -> Iterator[list[Any]]:
    """Two served models of one program, warm."""
    torch_mux.reset()
    with contextlib.ExitStack() as stack:
        if request.param == "simulated":
            compat.native.build()
            timing = Timing(enqueue=6e-6, capture=1e-4, launches=1e-4, snapshot=1e-6)
            state._state.engine = stack.enter_context(simulated_engine(timing))[0]
            state._state.settings = state._state.engine.settings
        found = [torch.compile(nn.Linear(4, 4).eval(), backend="mux", dynamic=False) for _ in range(2)]
        with torch.inference_mode():
            for _ in range(20):
                torch_mux.gather(*[(model, x) for model in found])
        state.engine().quiesce()
        yield found


def _gathered(models: list[Any]) -> None:
    torch_mux.gather(*[(model, x) for model in models])


def _called(models: list[Any]) -> None:
    models[0](x)


def _submitted(models: list[Any]) -> None:
    futures = torch_mux.submit_all(*[(model, x) for model in models])
    assert [future.result() is not None for future in futures]


def _called_back(models: list[Any]) -> None:
    told: list[Any] = []
    future = torch_mux.submit(models[0], x)
    future.add_done_callback(told.append)
    future.result(10.0)


def _awaited(models: list[Any]) -> None:
    async def one(model: Any) -> None:
        with contextlib.suppress(torch_mux.MuxError):
            await torch_mux.submit(model, x)

    async def all_of_them() -> None:
        await asyncio.gather(*[one(model) for model in models])

    asyncio.run(all_of_them())


def _raised(call: Callable[[], object]) -> None:
    with contextlib.suppress(torch_mux.MuxError):
        call()


def _late(models: list[Any]) -> None:
    with torch_mux.quota("late", deadline=1e-6):
        _raised(lambda: torch_mux.submit(models[0], x).result())
        _raised(lambda: torch_mux.gather(*[(model, x) for model in models]))
        _raised(lambda: models[0](x))
        _raised(lambda: torch_mux.submit_all((models[0], x), (models[1], x))[1].exception())


def _expired(models: list[Any]) -> None:
    with torch_mux.quota("held", rate=1.0, burst=1, deadline=2e-3, excess="hold"):
        _raised(lambda: torch_mux.submit(models[0], x).result())


def _refused(models: list[Any]) -> None:
    with torch_mux.quota("much", rate=1e-3, burst=1, excess="refuse"):
        for _ in range(2):
            _raised(lambda: torch_mux.submit(models[0], x).result())
            _awaited(models)


def _cancelled(models: list[Any]) -> None:
    with torch_mux.quota("slow", rate=1.0, burst=1, excess="hold"):
        futures = [torch_mux.submit(models[0], x) for _ in range(4)]
    for future in futures:
        future.cancel()
        _raised(future.result)


def _left_by(use: Callable[[], None]) -> Counter[str]:
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for _ in range(_N):
            use()
        gc.collect()
        return Counter(type(one).__name__ for one in gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
        gc.collect()


@pytest.mark.parametrize(
    "use",
    [
        _gathered,
        _called,
        _submitted,
        _called_back,
        _awaited,
        _late,
        _expired,
        _refused,
        _cancelled,
    ],
)
def test_what_ends_leaves_no_cyclic_garbage(models: list[Any], use: Callable[[list[Any]], None]) -> None:
    torch_mux.configure(quarantine=0, straggler=0)
    with torch.inference_mode():
        use(models)
        asyncio.run(asyncio.sleep(0))  # its modules
        state.engine().quiesce()
        state.engine().stats()
        for _ in range(3):  # what compiled the models may have been let go of meanwhile, but not every time
            kinds = _left_by(lambda: use(models))
            if kinds.total() < _N / 2:
                return
    raise AssertionError(kinds.most_common(10))

"""Closing, forking, resetting Dynamo, removing and warming up while requests are pending."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import torch_mux
from subjects import ENTRIES, Normed, ask, close, eventually, expected, instances, taught
from torch_mux import state
from torch_mux.errors import ClosedError, ModelRemoved
from torch_mux.lowering import plan as lowering_plan


class Held:
    """``compile_plan`` that waits for its gate."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.gate = threading.Event(), threading.Event()
        self._real = lowering_plan.compile_plan
        monkeypatch.setattr(lowering_plan, "compile_plan", self)

    def __call__(self, *args: Any) -> Any:
        self.entered.set()
        assert self.gate.wait(60)
        return self._real(*args)


def clients(model: Any, x: Tensor) -> tuple[list[threading.Thread], list[Any]]:
    """One thread an entry point that asks once and notes what it got."""
    seen: list[Any] = []

    def client(entry: str) -> None:
        try:
            seen.append(ask(entry, model, x))
        except Exception as error:
            seen.append(error)

    threads = [threading.Thread(target=client, args=(entry,)) for entry in ENTRIES]
    for thread in threads:
        thread.start()
    return threads, seen


def joined(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def ended_while_they_wait(
    monkeypatch: pytest.MonkeyPatch, end: Callable[[], object]
) -> tuple[Any, Tensor, list[Any]]:
    """A model, an input and what each client got, where ``end`` came while all waited for its compile."""
    held = Held(monkeypatch)
    x = torch.randn(4, 6)
    model: Any = torch.compile(Normed().eval(), backend="mux", dynamic=False)
    threads, seen = clients(model, x)
    assert held.entered.wait(60)
    time.sleep(0.2)
    threading.Timer(0.5, held.gate.set).start()
    end()
    joined(threads)
    return model, x, seen


def test_closing_tells_every_client_that_waits_for_a_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, seen = ended_while_they_wait(monkeypatch, torch_mux.close)
    assert [type(error) for error in seen] == [ClosedError] * len(ENTRIES)
    torch_mux.reset()
    for entry in ENTRIES:
        close(ask(entry, model, x), expected(model, x))


def test_a_reset_asks_again_for_what_waits_for_a_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, seen = ended_while_they_wait(monkeypatch, torch_mux.reset)
    for answer in seen:
        close(answer, expected(model, x))
    assert len(seen) == len(ENTRIES)


def test_resets_lose_no_call() -> None:
    x = torch.randn(4, 6)
    model = taught(Normed, "cpu", x)
    done, failed, answers = threading.Event(), [], []

    def client(entry: str) -> None:
        try:
            while not done.is_set():
                answers.append(ask(entry, model, x))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=client, args=(entry,)) for entry in ENTRIES]
    for thread in threads:
        thread.start()
    for _ in range(30):
        time.sleep(0.02)
        torch_mux.reset()
    done.set()
    joined(threads)
    assert not failed
    for answer in answers[:: max(1, len(answers) // 50)]:
        close(answer, expected(model, x))


def test_closing_serves_those_that_wait_for_companions() -> None:
    x = torch.randn(4, 6)
    model = taught(Normed, "cpu", x)
    torch_mux.configure(max_wait="60s")
    accepted = torch_mux.stats().tenants["default"].accepted
    threads, seen = clients(model, x)
    assert eventually(lambda: torch_mux.stats().tenants["default"].accepted == accepted + len(ENTRIES))
    torch_mux.close()
    joined(threads)
    for answer in seen:
        close(answer, expected(model, x))
    assert len(seen) == len(ENTRIES)


def test_a_fork_with_requests_pending() -> None:
    x = torch.randn(4, 6)
    model = taught(Normed, "cpu", x)

    def near(entry: str) -> bool:
        return torch.allclose(ask(entry, model, x), expected(model, x), atol=1e-5)

    torch_mux.configure(max_wait="60s")
    with torch.inference_mode():
        pending = torch_mux.submit(model, x)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        seen = "nothing"
        try:
            torch.set_num_threads(1)
            torch_mux.configure(max_wait=0.0)
            error = pending.exception(timeout=10)
            answers = [near(entry) for entry in ENTRIES]
            torch_mux.remove(model)
            torch_mux.close()
            torch_mux.reset()
            torch_mux.refresh(model)
            answers.append(near("gather"))
            seen = f"{type(error).__name__} {answers}"
        except BaseException as error:
            seen = repr(error)
        finally:
            os.write(writer, seen.encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        assert pipe.read() == f"DispatchFailed {[True] * 4}"
    os.waitpid(child, 0)
    torch_mux.configure(max_wait=0.0)
    close(pending.result(timeout=60), expected(model, x))


def test_dynamo_reset_and_on() -> None:
    x = torch.randn(4, 6)
    model = taught(Normed, "cpu", x)
    torch._dynamo.reset()
    for entry in (*ENTRIES, *ENTRIES):
        close(ask(entry, model, x), expected(model, x))
    assert len(state.engine().plans()) == 1
    assert len(instances(model)) == 1


def test_remove_with_requests_pending_serves_them_and_frees_the_model() -> None:
    x = torch.randn(4, 6)
    model = taught(Normed, "cpu", x)
    torch_mux.configure(max_wait="60s")
    with torch.inference_mode():
        pending = [torch_mux.submit(model, x) for _ in range(2)]
    torch_mux.remove(model)
    for entry in ENTRIES:
        with pytest.raises(ModelRemoved):
            ask(entry, model, x)
    torch_mux.configure(max_wait=0.0)
    for future in pending:
        close(future.result(timeout=60), expected(model, x))
    assert eventually(lambda: all(found.row is None for found in instances(model)))
    assert torch_mux.stats().tenants["default"].held < 1000
    torch_mux.refresh(model)
    close(ask("gather", model, x), expected(model, x))


def test_disabling_leaves_what_was_compiled_alone_and_enabling_serves_again() -> None:
    x = torch.randn(4, 6)
    model = taught(Normed, "cpu", x)
    torch_mux.configure(enabled=False)
    for entry in ENTRIES:
        close(ask(entry, model, x), expected(model, x))
    fresh: Any = torch.compile(torch.nn.Linear(6, 5).eval(), backend="mux", dynamic=False)
    close(ask("call", fresh, x), expected(fresh, x))
    assert len(torch_mux.explain().programs) == 1
    torch_mux.configure(enabled=True)
    before = torch_mux.stats().requests
    close(ask("gather", model, x), expected(model, x))
    assert torch_mux.stats().requests == before + 1


def test_warmup_leaves_nothing_to_be_compiled_for_these_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 6)
    model: Any = torch.compile(Normed().eval(), backend="mux", dynamic=False)
    with torch.inference_mode():
        done = torch_mux.warmup(model, x, sizes=(1, 3))
        jobs: list[Any] = []
        monkeypatch.setattr(state.engine().compile_thread, "submit", lambda *job: jobs.append(job))
        for size in (1, 3):
            torch_mux.gather(*[(model, x)] * size)
    assert jobs == []
    assert done.sizes == (1, 3)
    assert set(torch_mux.stats().sizes) >= {1, 3}

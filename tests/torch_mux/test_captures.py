"""What other threads may do while a graph is captured, and what becomes of a graph's memory."""

from __future__ import annotations

import threading

import pytest
import torch

from torch_mux import compat


def test_synchronize_waits_for_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    for module in (torch.cuda, torch.accelerator):
        monkeypatch.setattr(module, "synchronize", lambda *args: calls.append(args))
    compat.guard_synchronize()
    wrapped = torch.cuda.synchronize
    compat.guard_synchronize()
    assert torch.cuda.synchronize is wrapped
    other = threading.Thread(target=torch.cuda.synchronize, args=("cuda:0",))
    with compat.capturing():
        other.start()
        other.join(0.05)
        assert other.is_alive() and not calls
        torch.cuda.synchronize()  # the capturing thread itself is not held up
        torch.accelerator.synchronize()
        assert calls == [(), ()]
    other.join(5)
    assert calls[-1] == ("cuda:0",)


def _capture(pool: compat.Pool, stream: torch.cuda.Stream, x: torch.Tensor, y: torch.Tensor) -> compat.Graph:
    with torch.cuda.stream(stream):
        return compat.captured(lambda: y.copy_((x * 2).relu() + 1), pool)


@pytest.mark.gpu
def test_other_threads_draw_the_same_numbers_while_graphs_are_captured() -> None:
    device, done = torch.device("cuda", 0), threading.Event()
    x, y = torch.ones(64, device=device), torch.zeros(64, device=device)
    captured: list[compat.Graph] = []
    errors: list[Exception] = []

    def capture() -> None:
        pool, stream = compat.Pool(device), torch.cuda.Stream(device)
        try:
            while not done.is_set():
                captured.append(_capture(pool, stream, x, y))
        except Exception as error:
            errors.append(error)

    torch.manual_seed(7)
    wanted = [torch.randn(8, device=device) for _ in range(3000)]
    thread = threading.Thread(target=capture)
    thread.start()
    try:
        torch.manual_seed(7)
        drawn = [torch.randn(8, device=device) for _ in range(3000)]
    finally:
        done.set()
        thread.join()
    assert not errors and len(captured) > 20
    assert torch.equal(torch.stack(drawn), torch.stack(wanted))


@pytest.mark.gpu
def test_a_pool_serves_after_a_lost_capture_and_after_its_graphs_are_gone() -> None:
    device = torch.device("cuda", 0)
    pool, stream = compat.Pool(device), torch.cuda.Stream(device)
    x, y = torch.ones(64, device=device), torch.zeros(64, device=device)
    _capture(pool, stream, x, y)  # gone at once

    def broken() -> None:
        (x * 2).relu()
        raise ValueError("a tenant's own error")

    with torch.cuda.stream(stream), pytest.raises(ValueError, match="own error"):
        compat.captured(broken, pool)
    with torch.cuda.stream(stream), pytest.raises(RuntimeError, match="CUDA error"):
        compat.captured(lambda: torch.cuda.current_stream(device).synchronize(), pool)
    graph = _capture(pool, stream, x, y)
    graph.replay(stream)
    stream.synchronize()
    assert torch.equal(y, torch.full_like(y, 3.0))


@pytest.mark.gpu
def test_a_users_capture_survives_threads_that_leave_it_alone() -> None:
    device, failed = torch.device("cuda", 0), []
    event, y = torch.cuda.Event(), torch.zeros(4, device=device)
    event.record()

    def beside(megabytes: int) -> None:
        try:
            compat.leave_captures_alone()
            compat.leave_captures_alone()  # it was said already
            event.query()
            torch.empty(
                megabytes << 20, dtype=torch.uint8, device=device
            )  # more than the allocator has cached
        except RuntimeError as error:
            failed.append(error)

    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # in the global mode
        for megabytes in (100, 200):
            other = threading.Thread(target=beside, args=(megabytes,))
            other.start()
            other.join(30)
        y += 1
    assert not failed
    graph.replay()
    assert y.tolist() == [1.0] * 4


def test_leaving_captures_alone_brings_no_cuda_into_use() -> None:
    before = torch.cuda.is_initialized()
    compat.leave_captures_alone()
    assert torch.cuda.is_initialized() == before

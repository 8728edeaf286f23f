"""On the device: launches that follow one another, captured or not, read what the one before them wrote."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torch_mux.lowering.kernels import common, reference
from torch_mux.lowering.kernels.linear import linear_launch

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
HALF = torch.float16


@pytest.mark.parametrize("pdl", [False, True])
def test_one_captured_graph_serves_any_rows_and_counts(
    gpu_tools: Any, pdl: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not pdl:
        monkeypatch.setattr(common, "dependent", lambda device: False)
    slots, n = 8, 256
    x = torch.randn(slots, 64, n, device=CUDA).half()
    weights = [gpu_tools.guarded((torch.randn(n, n) / n**0.5).half()) for _ in range(slots)]
    table, rows, control = (
        gpu_tools.table(weights),
        torch.arange(slots, device=CUDA),
        gpu_tools.control(slots, 132),
    )
    middle, out = torch.empty_like(x), torch.empty_like(x)
    launches = [
        linear_launch(x, table, 1, rows, control, middle, n=n, k=n, activation="relu"),
        linear_launch(middle, table, 1, rows, control, out, n=n, k=n),
    ]
    for launch in launches:
        launch.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch.run()
    for active, cap in [(8, 132), (3, 2), (5, 66)]:
        order = torch.randperm(slots, device=CUDA)
        rows.copy_(order)
        control.copy_(gpu_tools.control(active, cap))
        out.fill_(7.0)
        graph.replay()
        replayed = out.clone()
        out.fill_(7.0)
        for launch in launches:
            launch.run()
            torch.cuda.synchronize()
        assert torch.equal(replayed, out)
        assert bool((replayed[active:] == 7.0).all())
        chosen = [weights[row] for row in order.tolist()]
        first = reference.linear(list(x), chosen, activation="relu")
        want = reference.linear([each.half() for each in first], chosen)
        gpu_tools.close(replayed[:active], torch.stack(want)[:active], HALF)


def test_a_chain_over_two_buffers_has_the_bits_of_launches_one_by_one(gpu_tools: Any) -> None:
    """Each launch reads what the one before it wrote, and writes what that one read."""
    slots, n = 8, 256
    weights = [gpu_tools.guarded((torch.randn(n, n) * (2 / n) ** 0.5).half()) for _ in range(slots)]
    table, rows = gpu_tools.table(weights), torch.arange(slots, device=CUDA)
    control, x = gpu_tools.control(slots, 132), torch.randn(slots, 197, n, device=CUDA).half()
    buffers = [torch.empty_like(x), torch.empty_like(x)]
    launches = [
        linear_launch(
            buffers[step % 2], table, 1, rows, control, buffers[(step + 1) % 2], n=n, k=n, activation="relu"
        )
        for step in range(20)
    ]
    for launch in launches:
        launch.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch.run()
    for active, cap in [(8, 132), (3, 1), (8, 7), (1, 132)]:
        control.copy_(gpu_tools.control(active, cap))
        found = []
        for run in (graph.replay, lambda: [launch.run() for launch in launches]):
            for _ in range(10):
                buffers[0].copy_(x)
                run()
                found.append(buffers[0].clone())
        buffers[0].copy_(x)
        for launch in launches:
            torch.cuda.synchronize()
            launch.run()
        assert all(torch.equal(each, buffers[0]) for each in found)
        assert bool(buffers[0][:active].any()) and torch.equal(buffers[0][active:], x[active:])

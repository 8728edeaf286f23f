"""Models of different architectures beside each other on a GPU: bits, overlap, accounts, memory."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_mux
from torch_mux import state

pytestmark = pytest.mark.gpu

CUDA = "cuda:0"


class Layers(nn.Sequential):
    """Linear layers of some microseconds each."""

    def __init__(self, depth: int = 24, width: int = 1024) -> None:
        super().__init__(*(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(depth)))


class Convolutions(nn.Sequential):
    """Convolutions of some microseconds each."""

    def __init__(self, depth: int = 24, width: int = 64) -> None:
        blocks = (nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU()) for _ in range(depth))
        super().__init__(*blocks)


Call = tuple[Any, Tensor]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch_mux.reset()
    torch_mux.configure(pack=1)
    torch.manual_seed(0)
    yield
    torch_mux.reset()


def compiled(model: nn.Module) -> Any:
    return torch.compile(model.eval().half().to(CUDA), backend="mux", dynamic=False)


def calls_of(larger: int = 1) -> list[Call]:
    """Of four models and three architectures; with inputs so many times as large the host is no limit."""
    rows = torch.randn(1, 256 * larger, 1024, device=CUDA, dtype=torch.half)
    image = torch.randn(1, 64, 56 * larger, 56, device=CUDA, dtype=torch.half)
    narrow = torch.randn(1, 128 * larger, 512, device=CUDA, dtype=torch.half)
    return [
        (compiled(Layers()), rows),
        (compiled(Convolutions()), image),
        (compiled(Layers(12, 512)), narrow),
        (compiled(Layers()), rows * 0.5),
    ]


def rounds(calls: Sequence[Call], count: int = 6) -> list[Tensor]:
    with torch.inference_mode():
        for _ in range(count):
            answers = torch_mux.gather(*calls)
            assert state.engine().quiesce(180)
    return answers


def executor() -> Any:
    return state.engine()._dispatchers[torch.device(CUDA)].executor


def test_kernels_of_two_programs_own_graphs_overlap(tmp_path: Path) -> None:
    calls = calls_of(16)[:2]
    rounds(calls)
    assert torch_mux.explain().mixes == (), "no joint plan"
    lanes = [lane for lane in executor()._lanes if lane.executables]
    assert len(lanes) == 2, "each was captured on its own branch"
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler, torch.inference_mode():
        for _ in range(3):
            torch_mux.gather(*calls)
        torch.cuda.synchronize()
    path = tmp_path / "trace.json"
    profiler.export_chrome_trace(str(path))
    kernels = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("cat") == "kernel"]
    spans: dict[str, list[tuple[float, float]]] = {"linear": [], "conv": []}
    for event in kernels:
        for kind, found in spans.items():
            if event["name"].startswith(kind):
                found.append((event["ts"], event["ts"] + event["dur"]))
    assert all(len(found) >= 24 for found in spans.values()), {name: len(n) for name, n in spans.items()}
    shared = sum(
        max(0.0, min(one[1], other[1]) - max(one[0], other[0]))
        for one, other in product(spans["linear"], spans["conv"])
    )
    assert shared > 20.0, "microseconds in which a layer of each was at work"


def test_bits_alone_coalesced_and_on_branches() -> None:
    calls = calls_of()
    with torch.inference_mode():
        want = [torch_mux.gather(call)[0] for call in calls]
    draw = torch.Generator().manual_seed(1)
    for _ in range(12):
        chosen = torch.randint(len(calls), (6,), generator=draw).tolist()
        for beside in (None, 1.0):
            torch_mux.configure(beside=beside)
            answers = rounds([calls[index] for index in chosen], 2)
            for answer, index in zip(answers, chosen, strict=True):
                assert torch.equal(answer, want[index])


def test_tenants_are_charged_the_time_in_which_the_device_was_busy() -> None:
    calls = calls_of(16)[:3]
    rounds(calls)
    before = torch_mux.stats().device_seconds
    flights, launch = [], executor().launch

    def launching(bundle: Any) -> Any:
        flights.append(launch(bundle))
        return flights[-1]

    executor().launch = launching
    torch.cuda.synchronize()
    origin = torch.cuda.Event(enable_timing=True)
    origin.record()
    with torch.inference_mode():
        for _ in range(100):
            torch_mux.gather(*calls)
    torch.cuda.synchronize()
    stats = torch_mux.stats()
    spans = sorted(
        (origin.elapsed_time(flight.start.event), origin.elapsed_time(flight.end.event)) for flight in flights
    )
    assert len(spans) == 300
    busy, reached, alone = 0.0, 0.0, 0.0
    for begin, end in spans:
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
        alone += end - begin
    charged = 1e3 * (stats.device_seconds - before)
    assert alone > 1.2 * busy, "they overlapped"
    assert charged == pytest.approx(busy, rel=0.02)
    assert sum(tenant.device_seconds for tenant in stats.tenants.values()) == pytest.approx(
        stats.device_seconds, rel=1e-6
    )


def test_every_branch_has_a_pool_that_is_counted_and_given_back() -> None:
    calls = calls_of()[:3]
    rounds(calls)
    lanes = [lane for lane in executor()._lanes if lane.executables]
    assert len(lanes) == 3
    pools = {id(lane.pool) for lane in lanes}
    assert len(pools) == 3 and all(lane.pool_bytes > 0 for lane in lanes)
    assert executor().pool_bytes() == sum(lane.pool_bytes for lane in lanes)
    ledger = sum(tenant.held for tenant in torch_mux.stats().tenants.values())
    torch.cuda.synchronize()
    before, held = torch.cuda.memory_reserved(), executor().pool_bytes()
    assert ledger >= held, "the tenants' memory has the pools in it"
    torch_mux.reset()
    del lanes, calls
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before - held


def test_a_tenant_with_a_limit_runs_on_one_branch_at_a_time() -> None:
    calls = calls_of()[:2]
    rounds(calls)
    flights, launch = [], executor().launch

    def launching(bundle: Any) -> Any:
        flights.append(launch(bundle))
        return flights[-1]

    executor().launch = launching
    with torch.inference_mode(), torch_mux.quota("alice", sms=0.5):
        for _ in range(10):
            torch_mux.gather(*calls)
    torch.cuda.synchronize()
    for first, second in pairwise(flights):
        assert first.end.event.elapsed_time(second.start.event) >= 0.0


def test_a_mix_is_measured_both_ways_and_says_so() -> None:
    calls = calls_of()[:3]
    rounds(calls, 2)
    torch_mux.configure(pack=8, pack_after=0.2, keep_plans=False)
    with torch.inference_mode():
        want = torch_mux.gather(*calls)
        until = time.monotonic() + 60.0
        while time.monotonic() < until:
            for _ in range(100):
                answers = torch_mux.gather(*calls)
            torch.cuda.synchronize()
            assert all(torch.equal(one, other) for one, other in zip(answers, want, strict=True))
            assert state.engine().quiesce(60)
            mixes = torch_mux.explain().mixes
            if mixes and mixes[-1].own_seconds and mixes[-1].joint_seconds and "used" in mixes[-1].measured:
                break
    (mix,) = torch_mux.explain().mixes
    assert mix.own_seconds and mix.joint_seconds
    faster = mix.joint_seconds < 0.97 * mix.own_seconds
    slower = mix.joint_seconds > mix.own_seconds / 0.97
    if faster or slower:
        assert mix.state == ("runs as one" if faster else "runs as its programs' own plans, which are faster")
    assert "own plans beside each other" in str(torch_mux.explain())

"""Prometheus metrics and the ``top`` command agree with ``stats()``."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_mux

prometheus = pytest.importorskip("prometheus_client")

from torch_mux import metrics, observe  # noqa: E402


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).relu()


@pytest.fixture
def models() -> list[Any]:
    return [torch.compile(Net().eval(), backend="mux") for _ in range(2)]


@pytest.fixture
def url() -> Iterator[str]:
    server, thread = metrics.serve(0)
    yield f"http://127.0.0.1:{server.server_port}/metrics"
    server.shutdown()
    server.server_close()
    thread.join(5)


def _serve(models: list[Any], tenant: str, rounds: int, **quota: Any) -> None:
    with torch.inference_mode(), torch_mux.quota(tenant, **quota):
        for _ in range(rounds):
            torch_mux.gather(*((model, torch.ones(1, 8)) for model in models))


def test_a_scrape_says_what_stats_says(models: list[Any], url: str) -> None:
    _serve(models, "alice", 5, weight=3)
    _serve(models, "bob", 2, weight=1)
    found, stats = observe.read(url), torch_mux.stats()
    assert found.tenants == ["alice", "bob"]
    for name, got in stats.tenants.items():
        assert found.of("requests_total", name, "ok") == got.ok == got.accepted
        assert found.of("accepted_requests_total", name) == got.accepted
        assert found.of("device_seconds_total", name) == pytest.approx(got.device_seconds)
        assert found.of("queue_seconds_total", name) == pytest.approx(got.queue_seconds)
        assert found.of("latency_seconds", name, "0.99") == got.p99
        assert found.of("pending_requests", name) == 0
    assert found.of("bundle_slots_count") == stats.bundles
    assert found.of("bundle_slots_sum") == stats.requests
    assert found.of("granted_share", "alice") == 0.75
    shares = [found.of("effective_share", name) for name in found.tenants]
    assert sum(shares) == pytest.approx(1.0) and min(shares) > 0


def test_a_reserve_is_granted_before_the_weights(models: list[Any], url: str) -> None:
    _serve(models, "alice", 2, weight=3)
    _serve(models, "bob", 2, weight=1)
    _serve(models, "carol", 2, weight=9, reserve=0.2)
    found = observe.read(url)
    granted = [found.of("granted_share", name) for name in ("alice", "bob", "carol")]
    assert granted == pytest.approx([0.6, 0.2, 0.2])
    assert torch_mux.stats().tenants["carol"].reserve == 0.2


def test_reserves_that_were_there_one_after_another_grant_no_more_than_all(
    models: list[Any], url: str
) -> None:
    _serve(models, "alice", 2)
    for name in ("bob", "carol"):
        scope = torch_mux.quota(name, reserve=0.8)
        with scope, torch.inference_mode():
            torch_mux.gather(*[(model, torch.randn(1, 8)) for model in models])
        scope.update(reserve=0.0)
    found = observe.read(url)
    granted = [found.of("granted_share", name) for name in ("alice", "bob", "carol")]
    assert granted == pytest.approx([0.0, 0.5, 0.5])


def test_what_a_tenant_got_is_told_by_model(models: list[Any]) -> None:
    class Other(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).tanh()

    other = torch.compile(Other().eval(), backend="mux")
    _serve(models, "alice", 3)
    _serve([other], "alice", 2)
    registry = prometheus.CollectorRegistry()
    metrics.register(registry)
    got = torch_mux.stats().tenants["alice"]
    assert {name: part.ok for name, part in got.models.items()} == {"Net": 6, "Other": 2}
    assert sum(part.device_seconds for part in got.models.values()) == pytest.approx(got.device_seconds)
    for name, part in got.models.items():
        labels = {"tenant": "alice", "model": name}
        value = registry.get_sample_value
        assert value("torch_mux_requests_total", {**labels, "outcome": "ok"}) == part.ok
        assert value("torch_mux_device_seconds_total", labels) == pytest.approx(part.device_seconds)
        assert value("torch_mux_queue_seconds_total", labels) == pytest.approx(part.queue_seconds)


def test_shares_are_those_since_the_scrape_before(models: list[Any], url: str) -> None:
    _serve(models, "alice", 3)
    _serve(models, "bob", 3)
    observe.read(url)
    _serve(models, "bob", 3)
    found = observe.read(url)
    assert found.of("effective_share", "bob") == found.of("granted_share", "bob") == 1.0
    assert found.of("effective_share", "alice") == found.of("granted_share", "alice") == 0.0


def test_programs_are_labelled_by_model(models: list[Any]) -> None:
    _serve(models, "alice", 3)
    registry = prometheus.CollectorRegistry()
    metrics.register(registry)
    (program,) = torch_mux.explain().programs
    labels = {"model": "Net", "program": program.fingerprint[:12]}

    def value(name: str) -> float:
        return float(registry.get_sample_value(f"torch_mux_{name}", labels) or 0.0)

    assert value("model_requests_total") == 6
    assert value("model_bundles_total") == sum(program.bundles.values())
    assert value("model_instances") == 2
    assert 0 < value("model_compile_seconds") == program.compile_seconds
    assert value("model_plan_from_disk") == 0


def test_before_the_first_request_there_is_nothing_to_say(url: str) -> None:
    assert observe.read(url).tenants == []


def test_a_taken_port_is_an_error(url: str) -> None:
    with pytest.raises(OSError, match="in use"):
        metrics.serve(int(url.rsplit(":", 1)[1].split("/")[0]))


def test_top_shows_rates_and_shares(models: list[Any], url: str) -> None:
    from rich.console import Console

    _serve(models, "alice", 1)
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            _serve(models, "alice", 5)

    thread = threading.Thread(target=load)
    thread.start()
    console = Console(file=io.StringIO(), width=120, force_terminal=False)
    try:
        observe.watch(url, 0.2, 2, console)
    finally:
        stop.set()
        thread.join()
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    (line,) = [line for line in printed.splitlines() if line.startswith("alice")]
    cells = line.split()
    assert float(cells[1]) > 0 and cells[4] == "100.0%"
    assert "requests/s" in printed and "2.0 requests each" in printed


def test_top_says_that_nobody_answers() -> None:
    command = [sys.executable, "-m", "torch_mux.cli", "top", "http://127.0.0.1:9/metrics", "--times", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "nobody answers" in done.stderr and "torch_mux.metrics.serve" in done.stderr

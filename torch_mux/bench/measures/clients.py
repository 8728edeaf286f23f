"""Clients in threads of their own, each waiting for its answers, against ``gather`` from one thread."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import torch

import torch_mux
from torch_mux.bench import measure
from torch_mux.bench.measures.stage import Stage

__all__ = ["clients"]

_CLIENTS: Final = 16
_REPETITIONS: Final = 3
_PATIENCE: Final = 300.0

Ask = Callable[[Any, tuple[Any, ...]], object]
WAYS: dict[str, Ask] = {
    "submit": lambda model, args: torch_mux.submit(model, *args).result(),
    "call": lambda model, args: model(*args),
}


def clients(stage: Stage) -> dict[str, Any]:
    """Requests a second: of ``gather``, of ``submit(...).result()`` and of plain calls by up to 16 threads.

    The ways take turns. Every bundle size that the clients can make is captured before.
    """
    count = min(_CLIENTS, len(stage.tenants.models))
    for size in range(1, count + 1):
        stage.mux.settle(stage.requests(size))
    rates: dict[str, list[float]] = {"gather": [], **{name: [] for name in WAYS}}
    latencies: dict[str, list[float]] = {name: [] for name in WAYS}
    for repetition in range(_REPETITIONS + 1):
        rounds = stage.rounds if repetition else max(1, stage.rounds // 10)
        seconds = measure.pipelined(stage.mux, stage.tenants, count, rounds)
        found = {"gather": count / seconds}
        for name, ask in WAYS.items():
            found[name], spent = _by_threads(stage, ask, count, rounds)
            latencies[name] = [*latencies[name], *spent] if repetition else []
        if repetition:
            for name, rate in found.items():
                rates[name].append(rate)
    middle = {name: statistics.median(each) for name, each in rates.items()}
    return {
        "clients": count,
        "requests_per_second": {name: [round(rate, 1) for rate in each] for name, each in rates.items()},
        "share_of_gather": {name: round(middle[name] / middle["gather"], 4) for name in WAYS},
        "latency_us": {name: _quantiles(each) for name, each in latencies.items()},
    }


def _by_threads(stage: Stage, ask: Ask, count: int, rounds: int) -> tuple[float, list[float]]:
    """Requests a second, and the seconds of each until it had its answer in hand."""
    barrier = threading.Barrier(count + 1, timeout=_PATIENCE)
    spent: list[list[float]] = [[] for _ in range(count)]
    errors: list[Exception] = []

    def client(index: int) -> None:
        model = stage.mux.models[index]
        rows = [row[index] for row in stage.tenants.requests]
        try:
            with torch.inference_mode(), torch_mux.quota(f"bench-client-{index}"):
                ask(model, rows[0])
                barrier.wait()
                for turn in range(rounds):
                    start = time.perf_counter()
                    ask(model, rows[turn % len(rows)])
                    spent[index].append(time.perf_counter() - start)
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=client, args=(index,), daemon=True) for index in range(count)]
    for thread in threads:
        thread.start()
    try:
        barrier.wait()
    except threading.BrokenBarrierError:
        start = 0.0
    else:
        start = time.perf_counter()
    for thread in threads:
        thread.join(_PATIENCE)
    stage.wait()
    total = time.perf_counter() - start
    real = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
    if real or errors:
        raise (real or errors)[0]
    if any(thread.is_alive() for thread in threads):
        raise TimeoutError(f"a client had no answer within {_PATIENCE:.0f} s")
    return count * rounds / total, [seconds for each in spent for seconds in each]


def _quantiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(1e6 * value for value in seconds)
    place = min(len(ordered) - 1, int(0.99 * len(ordered)))
    return {"median": round(statistics.median(ordered), 1), "p99": round(ordered[place], 1)}

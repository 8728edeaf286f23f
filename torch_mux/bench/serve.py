"""Open-loop serving: ``python -m torch_mux.bench.serve --json serve.json``.

One thread injects requests at arrival times computed before the run, all that are due at once; latency counts
from the scheduled time, so a generator that lags does not flatter. For each server the highest total rate is
searched whose p99 stays within the bound, with the same arrivals for all (coordinated omission:
Tene, "How NOT to Measure Latency", 2015).
"""

from __future__ import annotations

import argparse
import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from torch_mux.bench import measure
from torch_mux.bench.arrivals import PROCESSES, arrivals
from torch_mux.bench.servers import SERVERS, Server, default_servers
from torch_mux.bench.workloads import DTYPES, WORKLOADS, Tenants, build
from torch_mux.errors import UnparsableQuantity
from torch_mux.quotas import parse_duration

__all__ = ["Load", "Options", "closed_loop", "main", "open_loop", "search", "table"]

_NAP = 50e-6
_PATIENCE = 5.0
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        bound: seconds that p99 may take.
        seconds: length of one run.
        steps: runs of the search for the highest rate.
    """

    model: str
    tenants: int
    device: torch.device
    dtype: torch.dtype
    servers: tuple[str, ...]
    process: str
    bound: float
    seconds: float
    steps: int
    seed: int


@dataclass(frozen=True)
class Load:
    """One open-loop run.

    Attributes:
        offered: requests a second that arrived.
        answered: requests a second that were answered, until the last was.
        requests: how many arrived.
        missing: how many had no answer some seconds after the last arrival; they count as infinitely late.
        errors: how many failed.
        quantiles: latency in seconds by name, from the scheduled time; None where too many had no answer.
        lag: 0.99 quantile of seconds by which the generator injected too late.
        cost: seconds of the generator's thread a request.
    """

    offered: float
    answered: float
    requests: int
    missing: int
    errors: int
    quantiles: dict[str, float | None]
    lag: float
    cost: float

    @property
    def p99(self) -> float:
        """Seconds, infinite where more than one in a hundred had no answer."""
        found = self.quantiles["p99"]
        return math.inf if found is None else found


class _Answers:
    """When each request of a run was answered; told from any thread."""

    def __init__(self, count: int) -> None:
        self.times = [math.inf] * count
        self.errors = 0
        self._left = count
        self._lock = threading.Lock()
        self.all = threading.Event()

    def finished(self, number: int, now: float, error: BaseException | None) -> None:
        with self._lock:
            if error is None:
                self.times[number] = now
            else:
                self.errors += 1
            self._left -= 1
            if not self._left:
                self.all.set()


def _quantile(ordered: Sequence[float], q: float) -> float:
    return ordered[min(len(ordered) - 1, max(0, math.ceil(q * len(ordered)) - 1))]


def _finite(value: float) -> float | None:
    return value if value < math.inf else None


def open_loop(server: Server, tenants: Tenants, options: Options, rate: float) -> Load:
    """Injects at ``rate`` requests a second and waits for the answers."""
    requests, count = tenants.requests, len(tenants.models)
    planned = arrivals(options.process, rate, options.seconds, count, len(requests), options.seed)
    answers = _Answers(len(planned))
    lags, busy = [], 0.0
    start = time.perf_counter() + 0.01
    with torch.inference_mode():
        for number, one in enumerate(planned):
            while (gap := start + one.time - time.perf_counter()) > 0.0:
                server.poll()
                time.sleep(min(gap, _NAP))
            before = time.perf_counter()
            server.submit(number, one.tenant, requests[one.variant][one.tenant], answers.finished)
            lags.append(before - start - one.time)
            busy += time.perf_counter() - before
        last = time.perf_counter() + _PATIENCE
        while not answers.all.is_set() and time.perf_counter() < last:
            server.poll()
            time.sleep(_NAP)
    ended = [moment for moment in answers.times if moment < math.inf]
    span = max(max(ended, default=start) - start, options.seconds)
    late = sorted(moment - start - one.time for moment, one in zip(answers.times, planned, strict=True))
    return Load(
        offered=len(planned) / options.seconds,
        answered=len(ended) / span,
        requests=len(planned),
        missing=len(planned) - len(ended) - answers.errors,
        errors=answers.errors,
        quantiles={name: _finite(_quantile(late, q)) for name, q in _QUANTILES.items()},
        lag=_quantile(sorted(lags), 0.99),
        cost=busy / len(planned),
    )


def closed_loop(server: Server, tenants: Tenants, seconds: float) -> float:
    """Requests a second with one request of every tenant under way all the time, the most it serves."""
    requests, count = tenants.requests, len(tenants.models)
    lock, ready = threading.Lock(), threading.Event()
    back: list[int] = list(range(count))
    errors: list[BaseException] = []

    def finished(number: int, now: float, error: BaseException | None) -> None:
        with lock:
            back.append(number)
            if error is not None:
                errors.append(error)
        ready.set()

    start, served = time.perf_counter(), 0
    with torch.inference_mode():
        while (now := time.perf_counter()) < start + seconds + _PATIENCE:
            with lock:
                free, back[:] = list(back), []
            served += len(free)
            if now < start + seconds:
                for tenant in free:
                    server.submit(tenant, tenant, requests[served % len(requests)][tenant], finished)
            else:
                count -= len(free)
                if not count:
                    break
            server.poll()
            if not back and ready.wait(_NAP):
                ready.clear()
    if errors:
        raise errors[0]
    return (served - len(tenants.models)) / (time.perf_counter() - start)


def search(run: Callable[[float], Load], most: float, bound: float, steps: int) -> tuple[float, list[Load]]:
    """The highest rate tried whose p99 is within ``bound`` and that all were answered at; bisection.

    Args:
        run: one open-loop run at a rate.
        most: a rate that cannot be exceeded.
        bound: seconds.

    Returns:
        (that rate, 0 if none was; every run).
    """
    low, high, runs = 0.0, most, []
    for _ in range(steps):
        rate = (low + high) / 2
        found = run(rate)
        runs.append(found)
        if found.p99 <= bound and not found.errors:
            low = rate
        else:
            high = rate
    return low, runs


def _served(name: str, tenants: Tenants, options: Options) -> dict[str, Any]:
    server = SERVERS[name]()
    with torch.inference_mode():
        server.prepare(tenants)
    try:
        closed_loop(server, tenants, min(0.5, options.seconds))
        most = closed_loop(server, tenants, options.seconds)
        best, runs = search(
            lambda rate: open_loop(server, tenants, options, rate), 1.2 * most, options.bound, options.steps
        )
    finally:
        server.release()
    return {"server": name, "closed loop": most, "best rate": best, "runs": [asdict(one) for one in runs]}


def run(options: Options) -> dict[str, Any]:
    """All servers, one after another, with the same arrivals; a server that fails is a row with its error."""
    tenants = build(WORKLOADS[options.model], options.tenants, options.device, options.dtype)
    results = []
    for name in options.servers:
        try:
            results.append(_served(name, tenants, options))
        except Exception as error:
            results.append({"server": name, "failed": f"{type(error).__name__}: {error}"})
    said = asdict(options) | {"device": str(options.device), "dtype": str(options.dtype)}
    return {"environment": measure.environment(options.device), "options": said, "results": results}


def table(report: dict[str, Any]) -> str:
    """One line a server."""
    said = report["options"]
    bound = f"{said['bound'] * 1e3:g} ms"
    rows = [("server", "closed loop/s", f"rate/s with p99 <= {bound}", "p50 ms", "p99 ms", "generator us")]
    for found in report["results"]:
        if "failed" in found:
            rows.append((found["server"], found["failed"], "", "", "", ""))
            continue
        good = [one for one in found["runs"] if (one["quantiles"]["p99"] or math.inf) <= said["bound"]]
        best = max(good, key=lambda one: one["offered"], default=None)
        times = [f"{best['quantiles'][q] * 1e3:.2f}" for q in ("p50", "p99")] if best else ["-", "-"]
        cost = f"{best['cost'] * 1e6:.0f}" if best else "-"
        rows.append(
            (found["server"], f"{found['closed loop']:.0f}", f"{found['best rate']:.0f}", *times, cost)
        )
    title = f"{said['model']} x {said['tenants']}, {said['process']} arrivals"
    return "\n".join([f"{title}, {report['environment']['device']}", *measure.aligned(rows)])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m torch_mux.bench.serve", description=__doc__)
    result.add_argument("--model", default=None, help="resnet50, or tiny-cnn without a GPU")
    result.add_argument("--tenants", type=int, default=16)
    result.add_argument("--device", default=None, help="cuda or cpu")
    result.add_argument("--servers", default=None, help=f"of {', '.join(SERVERS)}")
    result.add_argument("--arrivals", default="poisson", choices=sorted(PROCESSES))
    result.add_argument("--bound", default="10ms", help="what p99 may take")
    result.add_argument("--seconds", type=float, default=3.0, help="length of a run")
    result.add_argument("--steps", type=int, default=7, help="runs of the search for the highest rate")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--json", type=Path, default=None, help="write the record here")
    return result


def _options(flags: argparse.ArgumentParser, given: argparse.Namespace) -> Options:
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    measure.require_device(flags, device.type)
    model = given.model or ("resnet50" if device.type == "cuda" else "tiny-cnn")
    if model not in WORKLOADS:
        flags.error(f"unknown model {model}; choose from {', '.join(WORKLOADS)}")
    servers = tuple(given.servers.split(",")) if given.servers else tuple(default_servers(device))
    unknown = sorted(set(servers) - set(SERVERS))
    if unknown:
        flags.error(f"unknown servers {', '.join(unknown)}; choose from {', '.join(SERVERS)}")
    if min(given.tenants, given.steps) < 1 or given.seconds <= 0:
        flags.error("--tenants, --steps and --seconds must be positive")
    try:
        bound = parse_duration(given.bound)
    except UnparsableQuantity as error:
        flags.error(f"--bound: {error}")
    dtype = DTYPES["float16" if device.type == "cuda" else "float32"]
    return Options(
        model,
        given.tenants,
        device,
        dtype,
        servers,
        given.arrivals,
        bound,
        given.seconds,
        given.steps,
        given.seed,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, writes the record and prints the table; 1 where a server failed."""
    flags = parser()
    arguments = flags.parse_args(argv)
    options = _options(flags, arguments)
    measure.announce(options.device)
    report = run(options)
    measure.write(report, arguments.json)
    print(table(report))
    return int(any("failed" in found for found in report["results"]))


if __name__ == "__main__":
    sys.exit(main())

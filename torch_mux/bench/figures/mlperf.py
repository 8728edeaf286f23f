"""MLPerf LoadGen's Server scenario over all tenants: one test whose sample index is (tenant, sample).

The package is ``mlcommons-loadgen``, of the extra ``bench``; it makes the arrivals (Poisson), measures the
latencies and judges the run (Reddi and others, "MLPerf Inference Benchmark", arXiv 1911.02549).
"""

from __future__ import annotations

import importlib
import queue
import re
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from torch_mux.bench.figures.base import Finding, Row
from torch_mux.bench.figures.stage import Stage
from torch_mux.bench.load import Client, Server, Shot

__all__ = ["LoadGenMissing", "measure", "server_scenario", "summary"]

#: Of our closed-loop maximum.
_LOAD: Final = 0.5
_LINE: Final = re.compile(r"^([^:=]+?)\s*[:=]\s*(.+?)\s*$", re.MULTILINE)


class LoadGenMissing(ModuleNotFoundError):
    """MLPerf's load generator is not installed."""

    def __init__(self) -> None:
        words = "MLPerf's load generator is not installed; run: pip install 'torch-mux[bench]'"
        super().__init__(words, name="mlperf_loadgen")


def _loadgen() -> Any:
    try:
        return importlib.import_module("mlperf_loadgen")
    except ModuleNotFoundError as error:
        if error.name != "mlperf_loadgen":
            raise
        raise LoadGenMissing from error


class _System:
    """The system under test: queries of LoadGen's thread go to a server, answers go back.

    LoadGen's calls give up the interpreter's lock, which the thread that found an answer would wait for
    again; so another one tells it of all answers there are.

    Attributes:
        failed: errors of requests; LoadGen knows no failures, so they are answered all the same.
    """

    def __init__(self, loadgen: Any, server: Server, clients: Sequence[Client]) -> None:
        self._loadgen, self._server, self._clients = loadgen, server, clients
        self._samples = len(clients[0].inputs)
        self.count = self._samples * len(clients)
        self._lock = threading.Lock()
        self._ids: dict[int, int] = {}
        self._next = 0
        self.failed: list[BaseException] = []
        self._ended: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._teller = threading.Thread(target=self._tell, name="mlperf-answers", daemon=True)
        self._teller.start()

    def issue(self, queries: Sequence[Any]) -> None:
        batch = []
        with self._lock:
            for query in queries:
                number, self._next = self._next, self._next + 1
                self._ids[number] = query.id
                tenant, sample = divmod(query.index, self._samples)
                client = self._clients[tenant]
                batch.append(Shot(number, client, client.inputs[sample]))
        with torch.inference_mode():
            self._server.submit(batch, self.finished)

    def finished(self, number: int, now: float, error: BaseException | None) -> None:
        with self._lock:
            if error is not None:
                self.failed.append(error)
            query = self._ids.pop(number)
        self._ended.put(query)

    def _tell(self) -> None:
        ended: list[int | None] = []
        while None not in ended:
            ended = [self._ended.get()]
            while not self._ended.empty():
                ended.append(self._ended.get())
            answers = [self._loadgen.QuerySampleResponse(one, 0, 0) for one in ended if one is not None]
            self._loadgen.QuerySamplesComplete(answers)

    def close(self) -> None:
        """Ends the thread; every query has been answered."""
        self._ended.put(None)
        self._teller.join()


def summary(text: str) -> dict[str, str]:
    """The lines ``name : value`` of LoadGen's summary."""
    return {name.strip(): value for name, value in _LINE.findall(text)}


def server_scenario(
    server: Server, clients: Sequence[Client], rate: float, bound: float, seconds: float, folder: Path
) -> dict[str, Any]:
    """One performance run of the Server scenario.

    Args:
        rate: target requests a second of all clients together.
        bound: seconds that p99 may take.
        folder: for LoadGen's logs.

    Returns:
        Whether LoadGen calls it valid, p99 in seconds, requests a second completed, and its whole summary.

    Raises:
        LoadGenMissing: it is not installed.
        RuntimeError: requests failed.
    """
    loadgen = _loadgen()
    system = _System(loadgen, server, clients)
    settings = loadgen.TestSettings()
    settings.scenario, settings.mode = loadgen.TestScenario.Server, loadgen.TestMode.PerformanceOnly
    settings.server_target_qps = rate
    settings.server_target_latency_ns = round(bound * 1e9)
    settings.server_target_latency_percentile = 0.99
    settings.server_coalesce_queries = (
        True  # what is due is issued by one call; latencies stay each query's own
    )
    settings.min_duration_ms = round(seconds * 1e3)
    settings.min_query_count = max(1, round(rate * seconds))
    logs = loadgen.LogSettings()
    logs.log_output.outdir = str(folder)
    logs.log_output.copy_summary_to_stdout = False
    logs.enable_trace = False
    under_test = loadgen.ConstructSUT(system.issue, lambda: None)
    library = loadgen.ConstructQSL(system.count, system.count, lambda _: None, lambda _: None)
    try:
        loadgen.StartTestWithLogSettings(under_test, library, settings, logs)
    finally:
        loadgen.DestroyQSL(library)
        loadgen.DestroySUT(under_test)
        system.close()
    if system.failed:
        raise RuntimeError(f"{len(system.failed)} requests failed, the first with {system.failed[0]!r}")
    said = summary((folder / "mlperf_log_summary.txt").read_text())
    return {
        "valid": said["Result is"] == "VALID",
        "p99": float(said["99.00 percentile latency (ns)"]) * 1e-9,
        "completed": float(said["Completed samples per second"]),
        "summary": said,
    }


def measure(stage: Stage) -> Finding:
    """All tenants of one architecture at half of the closed-loop maximum."""
    _loadgen()  # before anything is measured in vain
    clients = stage.rivals(stage.mux.name)
    rate = _LOAD * stage.capacity()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        bound, seconds = stage.options.bound, stage.options.seconds
        found = server_scenario(stage.mux, clients, rate, bound, seconds, Path(folder))
    found |= {"target rate": rate, "seconds": time.perf_counter() - begun}
    rows = (
        Row("MLPerf Server scenario, p99", 1e3 * found["p99"], 1e3 * bound, unit="ms"),
        Row("MLPerf Server scenario, completed", found["completed"], None, unit="req/s"),
        Row("MLPerf calls the run valid", float(found["valid"]), 1.0, most=False),
    )
    return Finding(rows, found)

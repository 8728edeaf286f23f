"""The papers' experiments on this GPU: ``python -m torch_mux.bench.paper --json paper-h100.json``.

Three figures of "Dynamic Space-Time Scheduling for GPU Inference" (arXiv 1901.00041) and "The OoO VLIW JIT
Compiler for GPU Inference" (arXiv 1901.10008), each as one kernel a tenant with weights of its own:

- *coalescing*: R tenants' products in one super-kernel, against one after another (time multiplexing), in
  branches of one CUDA graph (space multiplexing), and a vendor's batched product over stacked weights;
- *blocks*: the latency of one product against the multiprocessors that its cap leaves it;
- *together*: eight products one after another, as capped branches side by side, and coalesced.

Every contender's answer is compared with float64 first. Times are of CUDA graphs, medians over replays that
take turns.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_mux.bench import measure
from torch_mux.lowering.kernels.linear import linear_launch

__all__ = ["CASES", "Case", "geometric_mean", "main", "run", "summary"]

TENANTS = (1, 2, 4, 8, 16, 32, 64, 96, 120)
CAPS = (1, 2, 4, 8, 16, 24, 33, 44, 66, 88, 110, 132)
UNCAPPED = 1 << 20
NODES = 960  # a graph repeats its body until about so many nodes, so that its own launch weighs little
MOST_REPEATS = 40
TOLERANCE = {"float32": 1e-5, "tf32": 2e-3, "float16": 2e-3}


@dataclass(frozen=True)
class Case:
    """One matrix product of the papers: [m, k] by a weight [n, k] of each tenant's own.

    Attributes:
        precision: "float32" (true), "tf32" or "float16".
    """

    name: str
    m: int
    n: int
    k: int
    precision: str

    @property
    def dtype(self) -> torch.dtype:
        """Of operands and result."""
        return torch.float16 if self.precision == "float16" else torch.float32


_SHAPES = (("SGEMM 256x128x1152", 256, 128, 1152), ("RNN step 1x512x512", 1, 512, 512))
CASES = tuple(
    Case(name, m, n, k, precision)
    for name, m, n, k in _SHAPES
    for precision in ("float32", "tf32", "float16")
)
BLOCKS = tuple(
    Case(f"{m}x{n}x{k}", m, n, k, "float16")
    for m, n, k in ((256, 128, 1152), (196, 1024, 256), (197, 3072, 768))
)
TOGETHER = (BLOCKS[1], BLOCKS[2])


class Operands:
    """Inputs, weights and outputs of one case for so many tenants; the weights lie apart."""

    def __init__(self, case: Case, tenants: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.case, self.tenants, self.device = case, tenants, device
        draw = torch.randn((tenants, case.m, case.k), generator=generator, device=device)
        self.x = draw.to(case.dtype)
        self.weights = [
            (torch.randn((case.n, case.k), generator=generator, device=device) / case.k**0.5).to(case.dtype)
            for _ in range(tenants)
        ]
        self.stacked = torch.stack(self.weights)
        self.out = torch.empty((tenants, case.m, case.n), dtype=case.dtype, device=device)
        self.table = torch.tensor([[weight.data_ptr()] for weight in self.weights], device=device)
        self.rows = torch.arange(tenants, device=device)
        self.streams = [torch.cuda.Stream(device) for _ in range(tenants)]  # type: ignore[no-untyped-call]
        self._controls: dict[tuple[int, int], Tensor] = {}

    def control(self, active: int, cap: int) -> Tensor:
        """int32 [2] on the device: active slots and most multiprocessors; made before a capture."""
        key = active, cap
        if key not in self._controls:
            self._controls[key] = torch.tensor(key, dtype=torch.int32, device=self.device)
        return self._controls[key]

    def serial(self) -> None:
        """One vendor call a tenant, one after another."""
        for slot, weight in enumerate(self.weights):
            torch.mm(self.x[slot], weight.t(), out=self.out[slot])

    def branches(self) -> None:
        """One vendor call a tenant, each on a stream of its own."""
        self._fork(lambda slot: torch.mm(self.x[slot], self.weights[slot].t(), out=self.out[slot]))

    def _fork(self, body: Callable[[int], object]) -> None:
        trunk = torch.cuda.current_stream()
        for slot, stream in enumerate(self.streams):
            stream.wait_stream(trunk)
            with torch.cuda.stream(stream):
                body(slot)
        for stream in self.streams:
            trunk.wait_stream(stream)

    def batched(self) -> None:
        """The vendor's batched product over stacked weights."""
        torch.bmm(self.x, self.stacked.transpose(1, 2), out=self.out)

    def coalesced(self, cap: int = UNCAPPED) -> None:
        """One super-kernel for all tenants."""
        self._launch(slice(None), self.control(self.tenants, cap))

    def capped_branches(self, cap: int) -> None:
        """One of our kernels a tenant, each on a stream of its own and kept to ``cap`` multiprocessors."""
        control = self.control(1, cap)
        self._fork(lambda slot: self._launch(slice(slot, slot + 1), control))

    def _launch(self, slots: slice, control: Tensor) -> None:
        case = self.case
        linear_launch(
            self.x[slots], self.table, 0, self.rows[slots], control, self.out[slots], n=case.n, k=case.k,
            allow_tf32=case.precision == "tf32",
        ).run()  # fmt: skip

    def exact(self) -> Tensor:
        """float64 [tenants, m, n]."""
        return torch.bmm(self.x.double(), self.stacked.double().transpose(1, 2))


@dataclass(frozen=True)
class Contender:
    """A captured way to do one round of one case; ``microseconds`` of one round, a replay each."""

    name: str
    graph: torch.cuda.CUDAGraph
    repeats: int
    microseconds: list[float]

    def sample(self) -> None:
        """Times one replay."""
        start, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        self.microseconds.append(float(start.elapsed_time(end)) * 1e3 / self.repeats)


def contender(name: str, body: Callable[[], None], nodes: int, operands: Operands) -> Contender:
    """Checks ``body`` against float64, then captures it often enough for a graph of about ``NODES`` nodes.

    Raises:
        ValueError: its answer is wrong.
    """
    operands.out.fill_(float("nan"))
    body()
    exact = operands.exact()
    error = float((operands.out.double() - exact).norm() / exact.norm())
    if not error <= TOLERANCE[operands.case.precision]:
        raise ValueError(f"{name} of {operands.case.name} is wrong: relative error {error:.1e}")
    torch.cuda.synchronize()
    repeats = max(2, min(MOST_REPEATS, NODES // nodes))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            body()
    graph.replay()
    torch.cuda.synchronize()
    return Contender(name, graph, repeats, [])


def contend(
    bodies: dict[str, tuple[int, Callable[[], None]]], operands: Operands, replays: int
) -> list[dict[str, Any]]:
    """Times every body, taking turns; one that fails is a row with its error.

    Args:
        bodies: graph nodes of one round, and the round, by name.
    """
    torch.backends.cuda.matmul.allow_tf32 = operands.case.precision == "tf32"
    rows: list[dict[str, Any]] = []
    ready: list[Contender] = []
    for name, (nodes, body) in bodies.items():
        try:
            ready.append(contender(name, body, nodes, operands))
        except Exception as error:  # a peer that fails is reported, the others are measured
            rows.append({"contender": name, "error": f"{type(error).__name__}: {error}"})
    for _ in range(replays):
        for each in ready:
            each.sample()
    torch.backends.cuda.matmul.allow_tf32 = False
    for each in ready:
        times = sorted(each.microseconds)
        spread = {"median": statistics.median(times), "low": times[0], "high": times[-1]}
        rows.append({"contender": each.name, "microseconds": spread})
    return rows


def coalescing(cases: Sequence[Case], tenants: Sequence[int], replays: int) -> list[dict[str, Any]]:
    """The first figure."""
    device, results = torch.device("cuda", torch.cuda.current_device()), []
    for case in cases:
        for count in tenants:
            operands = Operands(case, count, device)
            bodies: dict[str, tuple[int, Callable[[], None]]] = {
                "serial": (count, operands.serial),
                "branches": (count, operands.branches),
                "batched, stacked weights": (1, operands.batched),
                "coalesced": (1, operands.coalesced),
            }
            rows = contend(bodies, operands, replays)
            results.append({"figure": "coalescing", "case": asdict(case), "tenants": count, "rows": rows})
    return results


def blocks(cases: Sequence[Case], caps: Sequence[int], replays: int) -> list[dict[str, Any]]:
    """The second figure: one tenant."""
    device, results = torch.device("cuda", torch.cuda.current_device()), []
    for case in cases:
        operands = Operands(case, 1, device)
        bodies: dict[str, tuple[int, Callable[[], None]]] = {
            str(cap): (1, partial(operands.coalesced, cap)) for cap in caps
        }
        rows = contend(bodies, operands, replays)
        results.append({"figure": "blocks", "case": asdict(case), "tenants": 1, "rows": rows})
    return results


def together(
    cases: Sequence[Case], caps: Sequence[int], replays: int, tenants: int = 8
) -> list[dict[str, Any]]:
    """The third figure."""
    device, results = torch.device("cuda", torch.cuda.current_device()), []
    for case in cases:
        operands = Operands(case, tenants, device)
        bodies: dict[str, tuple[int, Callable[[], None]]] = {
            "serial": (tenants, operands.serial),
            "coalesced": (1, operands.coalesced),
        }
        for cap in caps:
            bodies[f"branches of {cap}"] = (tenants, partial(operands.capped_branches, cap))
        rows = contend(bodies, operands, replays)
        results.append({"figure": "together", "case": asdict(case), "tenants": tenants, "rows": rows})
    return results


def run(tenants: Sequence[int] = TENANTS, replays: int = 15) -> dict[str, Any]:
    """All three figures as plain data."""
    with torch.inference_mode():
        results = coalescing(CASES, tenants, replays)
        results += blocks(BLOCKS, CAPS, replays)
        results += together(TOGETHER, (8, 16, 33, 66, 132), replays)
    return {"environment": measure.environment(torch.device("cuda")), "results": results}


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers; NaN of none."""
    return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan


def _medians(result: dict[str, Any]) -> dict[str, float]:
    return {
        row["contender"]: row["microseconds"]["median"] for row in result["rows"] if "microseconds" in row
    }


def summary(report: dict[str, Any]) -> str:
    """The figures as text: ratios to coalescing and their geometric means over 2 and more tenants."""
    lines, ratios = [], dict[str, dict[str, list[float]]]()
    for result in report["results"]:
        found, case = _medians(result), result["case"]
        title = f"{result['figure']:10} {case['name']:20} {case['precision']:8} R={result['tenants']:<4d}"
        failed = [f"{row['contender']} FAILED: {row['error']}" for row in result["rows"] if "error" in row]
        lines.append(title + "  ".join([f"{name} {value:.1f}" for name, value in found.items()] + failed))
        if result["figure"] == "coalescing" and result["tenants"] > 1 and "coalesced" in found:
            for name, value in found.items():
                group = ratios.setdefault(f"{case['name']} {case['precision']}", {})
                group.setdefault(name, []).append(value / found["coalesced"])
    for case, group in ratios.items():
        means = "  ".join(f"{name} {geometric_mean(values):.2f}" for name, values in group.items())
        lines.append(f"times coalesced, geometric mean over R: {case}: {means}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, writes the record and prints the table last; 1 where a contender failed."""
    flags = argparse.ArgumentParser(prog="python -m torch_mux.bench.paper", description=__doc__)
    flags.add_argument("--json", type=Path, default=None, help="write the record here")
    flags.add_argument("--tenants", default=",".join(map(str, TENANTS)), help="comma-separated numbers R")
    flags.add_argument("--replays", type=int, default=15, help="timed replays of each graph")
    options = flags.parse_args(argv)
    if not torch.cuda.is_available():
        flags.error("the papers' experiments need a CUDA device; none was found")
    report = run([int(count) for count in options.tenants.split(",")], options.replays)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1, default=str) + "\n")
    print(summary(report))
    return int(any("error" in row for result in report["results"] for row in result["rows"]))


if __name__ == "__main__":
    sys.exit(main())

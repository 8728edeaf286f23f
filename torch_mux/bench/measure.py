"""Times, errors and launches of one contender, and the facts of the machine they were taken on."""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.profiler
from torch import Tensor

from torch_mux import __version__
from torch_mux.bench.contenders import Contender, SelfTimed, synchronize
from torch_mux.bench.workloads import Tenants

__all__ = [
    "Memory",
    "Spread",
    "aligned",
    "announce",
    "device_name",
    "environment",
    "errors",
    "launches",
    "memory_of",
    "neighbours",
    "pipelined",
    "read",
    "references",
    "require_device",
    "synchronised",
    "write",
]


#: More than a CUDA context and its libraries take.
_CONTEXT = 3 << 29


@dataclass(frozen=True)
class Spread:
    """Microseconds a round over the repetitions of one measurement."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """The spread of times in seconds."""
        scaled = [1e6 * value for value in seconds]
        return cls(statistics.median(scaled), min(scaled), max(scaled))

    def data(self) -> dict[str, float]:
        """Plain data for JSON."""
        return asdict(self)


def pipelined(contender: Contender, tenants: Tenants, count: int, rounds: int) -> float:
    """Seconds a round when ``rounds`` rounds are enqueued and waited for once."""
    if isinstance(contender, SelfTimed):
        return contender.pipelined(count, rounds)
    rows = [row[:count] for row in tenants.requests]
    synchronize(rows[0])
    start = time.perf_counter()
    for index in range(rounds):
        contender.round(rows[index % len(rows)])
    synchronize(rows[0])
    return (time.perf_counter() - start) / rounds


def synchronised(contender: Contender, tenants: Tenants, count: int, rounds: int) -> float:
    """Median seconds of a round that is waited for before the next one starts."""
    if isinstance(contender, SelfTimed):
        return contender.synchronised(count, rounds)
    rows = [row[:count] for row in tenants.requests]
    times = []
    for index in range(rounds):
        synchronize(rows[0])
        start = time.perf_counter()
        contender.round(rows[index % len(rows)])
        synchronize(rows[0])
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def references(tenants: Tenants, shared: bool = False) -> list[list[Tensor]]:
    """``[variant][tenant]`` answers of the same weights in float64, eager, on the same device.

    Args:
        shared: every request is answered with the first tenant's weights.
    """
    answers: list[list[Tensor]] = [[] for _ in tenants.requests]
    exact = copy.deepcopy(tenants.models[0]).double()
    for tenant, model in enumerate(tenants.models):
        if tenant and not shared:
            exact = copy.deepcopy(model).double()
        for variant, row in enumerate(tenants.requests):
            args = [x.double() if x.is_floating_point() else x for x in row[tenant]]
            answers[variant].append(tenants.workload.tensor(exact(*args)).clone())
    return answers


def errors(
    contender: Contender, tenants: Tenants, exact: Sequence[Sequence[Tensor]], count: int
) -> dict[str, float]:
    """Relative l2 error against ``exact``: the mean and the worst over tenants and variants of the inputs.

    All variants are asked for before any answer is read: an answer that a later round overwrites shows.
    """
    rounds = [contender.round(row[:count]) for row in tenants.requests]
    synchronize(tenants.requests[0])
    found = []
    for answers, wanted in zip(rounds, exact, strict=True):
        for answer, want in zip(answers, wanted, strict=False):
            got = answer if isinstance(answer, Tensor) else tenants.workload.tensor(answer)
            found.append(float((got.double() - want).norm() / want.norm()))
    return {"mean": statistics.fmean(found), "worst": max(found), "answers": float(len(found))}


def launches(contender: Contender, tenants: Tenants, count: int) -> dict[str, int] | None:
    """Kernels and copies of one round by the profiler; None on a CPU and for other processes' launches."""
    row = tenants.requests[0][:count]
    if not row[0][0].is_cuda or isinstance(contender, SelfTimed):
        return None
    contender.round(row)
    synchronize(row)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        contender.round(row)
        synchronize(row)
    names = [str(event.name) for event in profiler.events() or [] if event.device_type.name == "CUDA"]
    copies = [name for name in names if name.startswith(("Memcpy", "Memset"))]
    return {"kernels": len(names) - len(copies), "copies": len(copies)}


@dataclass(frozen=True)
class Memory:
    """Device bytes before and after something: allocated by tensors, reserved by the allocator."""

    allocated: int
    reserved: int

    @classmethod
    def now(cls, device: torch.device) -> Memory:
        """The state of the caching allocator; zeros on a CPU."""
        if device.type != "cuda":
            return cls(0, 0)
        torch.cuda.synchronize()
        return cls(torch.cuda.memory_allocated(), torch.cuda.memory_reserved())


def memory_of(action: Callable[[], object], device: torch.device) -> dict[str, int]:
    """Runs ``action``; the device bytes that it left allocated and reserved."""
    before = Memory.now(device)
    action()
    after = Memory.now(device)
    return {"allocated": after.allocated - before.allocated, "reserved": after.reserved - before.reserved}


def commit() -> str | None:
    """The git commit from TORCH_MUX_COMMIT or the repository around this file, else None."""
    if "TORCH_MUX_COMMIT" in os.environ:
        return os.environ["TORCH_MUX_COMMIT"]
    command = ["git", "rev-parse", "HEAD"]
    try:
        folder = Path(__file__).resolve().parent
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def neighbours(device: torch.device) -> str | None:
    """Who else seems to use the GPU, in words; None where nobody does, or on a CPU.

    Processes by NVML where its Python package is installed and may see them; else device memory that is in
    use and not this process's.
    """
    if device.type != "cuda":
        return None
    try:
        listed = torch.cuda.list_gpu_processes(device)
    except RuntimeError as error:  # NVML may be out of reach in a container
        listed = f"no list of processes: {error}"
    others = [
        line.strip()
        for line in re.findall(r"process\s+\d+.*", listed)
        if str(os.getpid()) not in line.split()
    ]
    if others:
        return f"other processes use this GPU: {'; '.join(others)}"
    free, total = torch.cuda.mem_get_info(device)
    foreign = total - free - torch.cuda.memory_reserved(device)
    if foreign > _CONTEXT:
        return f"{foreign / 2**30:.1f} GiB of this GPU's memory are in use outside this process's tensors"
    return None


def require_device(flags: argparse.ArgumentParser, name: str) -> None:
    """Ends with a message and exit code 2 where there is no such device."""
    try:
        device = torch.device(name)
    except RuntimeError:
        flags.error(f"unknown device {name!r}; choose cuda or cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        flags.error("PyTorch sees no GPU here; --device cpu measures on the CPU")


def read(flags: argparse.ArgumentParser, path: Path) -> dict[str, Any]:
    """A record from a file; ends with a message and exit code 2 where there is none."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        flags.error(f"there is no record {path}")
    except ValueError as error:
        flags.error(f"{path} is no record: {error}")
    return found


def announce(device: torch.device) -> None:
    """Warns on stderr where another process uses the GPU: times then measure both."""
    found = neighbours(device)
    if found is not None:
        print(f"warning: {found}; times will not be this process's alone", file=sys.stderr, flush=True)


def write(report: dict[str, Any], path: Path | None) -> None:
    """Writes a record as JSON; a reader never sees half of one. Nothing where there is no path."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.part")
    fresh.write_text(json.dumps(report, indent=1, default=str) + "\n")
    fresh.replace(path)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equally many cells as lines of a table."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def command(argv: Sequence[str]) -> str:
    """What made a record, without the folders of the machine that it ran on."""
    module = f"torch_mux.bench.{Path(argv[0]).stem}" if argv[0].endswith(".py") else Path(argv[0]).name
    rest = [Path(word).name if os.path.isabs(word) else word for word in argv[1:]]
    return " ".join(["python -m" if argv[0].endswith(".py") else "", module, *rest]).strip()


def call_seconds(calls: int = 20_000) -> float:
    """Seconds that a call of a Python function takes on this host, the least of several loops.

    What serving costs the host is Python for the most part, and hosts differ several times in that: host
    figures of two machines are divided by it before they are compared.
    """

    def nothing(argument: int) -> int:
        return argument

    def loop() -> float:
        begin = time.perf_counter()
        for number in range(calls):
            nothing(number)
        return (time.perf_counter() - begin) / calls

    return min(loop() for _ in range(9))


def device_name(device: torch.device) -> str:
    """Of a GPU as CUDA gives it, of a CPU its architecture at least."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_properties(device).name)
    return platform.processor() or platform.machine()


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions, commit and command line of a record."""
    import triton

    facts: dict[str, Any] = {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "python_call_ns": call_seconds() * 1e9,
        "torch_mux": __version__,
        "commit": commit(),
        "command": command(sys.argv),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "neighbours": neighbours(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"sms": properties.multi_processor_count, "cuda": torch.version.cuda}
    return facts

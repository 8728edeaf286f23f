"""From ``import torch`` to coalesced answers: ``python -m torch_mux.bench.start --json start.json``.

Each measurement is a process of its own that imports torch, makes the models, compiles them with mux and asks
all of them at once. The first one fills the compile caches, or finds them; those that are counted find them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["PARTS", "child", "main", "table"]

#: What a process does, in order.
PARTS = ("import torch", "make the models", "first answers", "second answers")
_LIMIT = 600.0


def child(model: str, tenants: int, device: str, dtype: str) -> dict[str, float]:
    """Seconds of each part, in this process, which must not have imported torch; and launches in sum.

    Raises:
        RuntimeError: an answer is not that of eager PyTorch.
    """
    marks = [time.perf_counter()]

    def mark() -> None:
        if device == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    import torch

    marks.append(time.perf_counter())
    from torch_mux.bench.workloads import DTYPES, WORKLOADS

    workload, place = WORKLOADS[model], torch.device(device)
    with torch.device(place):  # random weights are drawn where they are used
        nets = [workload.model().to(place, DTYPES[dtype]) for _ in range(tenants)]
    inputs = [
        tuple(x.to(place, DTYPES[dtype]) if x.is_floating_point() else x.to(place) for x in given)
        for given in (workload.inputs(torch.Generator().manual_seed(seed)) for seed in range(tenants))
    ]
    mark()
    import torch_mux

    models = [torch.compile(net, backend="mux", dynamic=False) for net in nets]
    with torch.inference_mode():
        answers = torch_mux.gather(*[(net, *given) for net, given in zip(models, inputs, strict=True)])
        mark()
        torch_mux.gather(*[(net, *given) for net, given in zip(models, inputs, strict=True)])
        mark()
        for answer, net, given in zip(answers, nets, inputs, strict=True):
            got, want = workload.tensor(answer).double(), workload.tensor(net(*given)).double()
            if not (got - want).norm() <= 0.02 * want.norm():
                raise RuntimeError("an answer is not that of eager PyTorch")
    seconds = [after - before for before, after in itertools.pairwise(marks)]
    return dict(zip(PARTS, seconds, strict=True)) | {"bundles": float(torch_mux.stats().bundles)}


def _process(model: str, tenants: int, device: str, dtype: str) -> dict[str, float]:
    """What a fresh process measures.

    Raises:
        RuntimeError: it failed; the message is the end of what it printed.
    """
    given = [model, str(tenants), device, dtype]
    command = [sys.executable, "-m", "torch_mux.bench.start", "--child", *given]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT, check=False)
    if done.returncode:
        raise RuntimeError(f"{model}: {done.stderr.strip()[-800:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found | {"process": time.perf_counter() - start}


def run(model: str, tenants: int, device: str, dtype: str, repetitions: int) -> dict[str, Any]:
    """A filling process and ``repetitions`` counted ones; plain data."""
    import torch

    from torch_mux.bench import measure

    first, *counted = [_process(model, tenants, device, dtype) for _ in range(repetitions + 1)]
    return {
        "environment": measure.environment(torch.device(device)),
        "options": {"model": model, "tenants": tenants, "device": device, "dtype": dtype},
        "first": first,
        "results": counted,
    }


def table(report: dict[str, Any]) -> str:
    """Seconds by part, one line a process."""
    from torch_mux.bench import measure

    options = report["options"]
    names = [*PARTS, "process"]
    rows = [("process", *names[:-1], "until the first answers")]
    for name, found in (("first", report["first"]), *(("warm", found) for found in report["results"])):
        whole = sum(found[part] for part in PARTS[:3])
        rows.append((name, *(f"{found[part]:.2f}" for part in PARTS), f"{whole:.2f}"))
    title = f"{options['model']} x {options['tenants']}, seconds, {report['environment']['device']}"
    return "\n".join([title, *measure.aligned(rows)])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m torch_mux.bench.start", description=__doc__)
    result.add_argument("--model", default=None, help="resnet50, or tiny-cnn without a GPU")
    result.add_argument("--tenants", type=int, default=16)
    result.add_argument("--device", default=None, help="cuda or cpu")
    result.add_argument("--repetitions", type=int, default=3, help="warm processes")
    result.add_argument("--json", type=Path, default=None, help="write the record here")
    result.add_argument("--child", nargs=4, default=None, help=argparse.SUPPRESS)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, writes the record and prints the table."""
    flags = parser()
    arguments = flags.parse_args(argv)
    if arguments.child is not None:
        model, tenants, device, dtype = arguments.child
        print(json.dumps(child(model, int(tenants), device, dtype)))
        return 0
    import torch

    from torch_mux.bench import measure
    from torch_mux.bench.workloads import WORKLOADS

    cuda = torch.cuda.is_available()
    device = arguments.device or ("cuda" if cuda else "cpu")
    model = arguments.model or ("resnet50" if device == "cuda" else "tiny-cnn")
    if model not in WORKLOADS:
        flags.error(f"unknown model {model}; choose from {', '.join(WORKLOADS)}")
    if min(arguments.tenants, arguments.repetitions) < 1:
        flags.error("--tenants and --repetitions must be at least 1")
    measure.require_device(flags, device)
    measure.announce(torch.device(device))
    dtype = "float16" if device == "cuda" else "float32"
    report = run(model, arguments.tenants, device, dtype, arguments.repetitions)
    measure.write(report, arguments.json)
    print(table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""From ``import torch`` to coalesced answers: ``python -m torch_mux.bench.start --json start.json``.

Each measurement is a process of its own that imports torch, makes the models, compiles them and asks all of
them: through mux, and through Inductor one after another. The first process of each fills the compile caches,
or finds them; those that are counted find them. An installation keeps the bytecode of its packages; where
PYTHONDONTWRITEBYTECODE and a bare image leave none, each process compiles the sources of PyTorch anew.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["CONTENDERS", "PARTS", "child", "main", "table"]

#: What a process does, in order.
PARTS = ("import torch", "make the models", "torch.compile", "first answers", "second answers")
CONTENDERS = ("mux", "inductor")
_LIMIT = 600.0


def child(contender: str, model: str, tenants: int, device: str, dtype: str) -> dict[str, float]:
    """Seconds of each part, in this process, which must not have imported torch; and mux's bundles in sum.

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
    from torch_mux.bench.workloads import DTYPES, WORKLOADS, build

    workload = WORKLOADS[model]
    made = build(workload, tenants, torch.device(device), DTYPES[dtype], variants=1)
    nets, inputs = made.models, made.requests[0]
    mark()
    models: list[Callable[..., Any]] = [torch.compile(net, backend=contender, dynamic=False) for net in nets]
    mark()
    import torch_mux

    rounds = [(model, *given) for model, given in zip(models, inputs, strict=True)]
    answers: Sequence[Any] = ()
    with torch.inference_mode():
        for _ in range(2):
            if contender == "mux":
                answers = torch_mux.gather(*rounds)
            else:
                answers = [model(*given) for model, given in zip(models, inputs, strict=True)]
            mark()
        for answer, net, given in zip(answers, nets, inputs, strict=True):
            got, want = workload.tensor(answer).double(), workload.tensor(net(*given)).double()
            if not (got - want).norm() <= 0.02 * want.norm():
                raise RuntimeError("an answer is not that of eager PyTorch")
    seconds = [after - before for before, after in itertools.pairwise(marks)]
    bundles = torch_mux.stats().bundles if contender == "mux" else 0
    return dict(zip(PARTS, seconds, strict=True)) | {"bundles": float(bundles)}


def _process(contender: str, model: str, tenants: int, device: str, dtype: str) -> dict[str, float]:
    """What a fresh process measures.

    Raises:
        RuntimeError: it failed; the message is the end of what it printed.
    """
    given = [contender, model, str(tenants), device, dtype]
    command = [sys.executable, "-m", "torch_mux.bench.start", "--child", *given]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT, check=False)
    if done.returncode:
        raise RuntimeError(f"{contender}, {model}: {done.stderr.strip()[-800:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found | {"process": time.perf_counter() - start}


def run(
    model: str,
    tenants: int,
    device: str,
    dtype: str,
    repetitions: int,
    contenders: Sequence[str] = CONTENDERS,
) -> dict[str, Any]:
    """A filling process and ``repetitions`` counted ones of each contender, in turn; plain data."""
    import torch

    from torch_mux.bench import measure

    found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for _ in range(repetitions + 1):
        for name in contenders:
            found[name].append(_process(name, model, tenants, device, dtype))
    return {
        "environment": measure.environment(torch.device(device)),
        "options": {
            "model": model,
            "tenants": tenants,
            "device": device,
            "dtype": dtype,
            "python writes bytecode": not sys.dont_write_bytecode,
        },
        "first": {name: processes[0] for name, processes in found.items()},
        "results": {name: processes[1:] for name, processes in found.items()},
    }


def table(report: dict[str, Any]) -> str:
    """Seconds by part, one line a process."""
    from torch_mux.bench import measure

    options = report["options"]
    rows = [("contender", "process", *PARTS, "until the first answers")]
    for contender, counted in report["results"].items():
        for name, found in (("first", report["first"][contender]), *(("warm", found) for found in counted)):
            whole = sum(found[part] for part in PARTS[:4])
            rows.append((contender, name, *(f"{found[part]:.2f}" for part in PARTS), f"{whole:.2f}"))
    title = f"{options['model']} x {options['tenants']}, seconds, {report['environment']['device']}"
    return "\n".join([title, *measure.aligned(rows)])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m torch_mux.bench.start", description=__doc__)
    result.add_argument("--model", default=None, help="resnet50, or tiny-cnn without a GPU")
    result.add_argument("--tenants", type=int, default=16)
    result.add_argument("--device", default=None, help="cuda or cpu")
    result.add_argument("--repetitions", type=int, default=3, help="warm processes of each contender")
    result.add_argument("--contenders", default=",".join(CONTENDERS), help=f"of {', '.join(CONTENDERS)}")
    result.add_argument("--json", type=Path, default=None, help="write the record here")
    result.add_argument("--child", nargs=5, default=None, help=argparse.SUPPRESS)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, writes the record and prints the table."""
    flags = parser()
    arguments = flags.parse_args(argv)
    if arguments.child is not None:
        contender, model, tenants, device, dtype = arguments.child
        print(json.dumps(child(contender, model, int(tenants), device, dtype)))
        return 0
    import torch

    from torch_mux.bench import measure
    from torch_mux.bench.workloads import WORKLOADS

    cuda = torch.cuda.is_available()
    device = arguments.device or ("cuda" if cuda else "cpu")
    model = arguments.model or ("resnet50" if device == "cuda" else "tiny-cnn")
    if model not in WORKLOADS:
        flags.error(f"unknown model {model}; choose from {', '.join(WORKLOADS)}")
    contenders = arguments.contenders.split(",")
    unknown = sorted(set(contenders) - set(CONTENDERS))
    if unknown:
        flags.error(f"unknown contenders {', '.join(unknown)}; choose from {', '.join(CONTENDERS)}")
    if min(arguments.tenants, arguments.repetitions) < 1:
        flags.error("--tenants and --repetitions must be at least 1")
    measure.require_device(flags, device)
    measure.announce(torch.device(device))
    dtype = "float16" if device == "cuda" else "float32"
    report = run(model, arguments.tenants, device, dtype, arguments.repetitions, contenders)
    measure.write(report, arguments.json)
    print(table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The table of serving figures by one command: ``python -m torch_mux.bench.serve --json serve.json``.

Requests arrive one by one from seeded processes, or closed-loop clients keep so many under way; each figure
measures one promise of the runtime and compares it with its target. Programs are compiled ahead by processes
side by side (``--ahead``), models are built and warmed once for all figures, a run in which a graph was
captured is measured once more, and the record is written after each figure, so that a run that is cut off
leaves what it has.

Mux serves with ``collector="idle"``, as a server is advised to do. The runtime cannot see when a peer in the
same process has nothing to do: while one is measured Python's collector is off, so that it stops for no
collection at all. The record says so (``collector``).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from torch_mux import state
from torch_mux.bench import measure
from torch_mux.bench.ahead import Wanted, compile_ahead
from torch_mux.bench.arrivals import PROCESSES
from torch_mux.bench.figures import (
    aggressor,
    deadlines,
    host,
    knob,
    latency,
    mlperf,
    prediction,
    rate,
    shares,
)
from torch_mux.bench.figures.base import Finding, cells
from torch_mux.bench.figures.stage import Options, Stage, configured
from torch_mux.bench.plot_serve import draw
from torch_mux.bench.servers import PEERS, default_peers
from torch_mux.bench.workloads import DTYPES, WORKLOADS
from torch_mux.errors import UnparsableQuantity
from torch_mux.quantities import parse_duration

__all__ = ["FIGURES", "main", "run", "table"]

#: In the order in which they run: first those that need one architecture only.
FIGURES: Final[Mapping[str, Callable[[Stage], Finding]]] = {
    "rate": rate.measure,
    "aggressor": aggressor.measure,
    "deadlines": deadlines.measure,
    "knob": knob.measure,
    "host": host.measure,
    "mlperf": mlperf.measure,
    "mix": rate.measure_mix,
    "shares": shares.measure,
    "weights": shares.measure_weights,
    "prediction": prediction.measure,
    "latency": latency.measure,
}
_MODELS: Final = {
    "cuda": ("resnet50", "vit", "bert", "mobilenet"),
    "cpu": ("tiny-cnn", "tiny-encoder", "tiny-mlp", "tiny-mixer"),
}
#: Of one run, and of the search for the highest rate; as they are and with ``--quick``.
_SECONDS: Final = {"cuda": (1.2, 0.7), "cpu": (1.0, 0.4)}
_STEPS: Final = (5, 4)
#: Figures of which all four architectures are served.
_CROWDS: Final = frozenset({"mix", "shares", "weights", "prediction", "latency"})
#: Figures whose requests have several samples each.
_HEAVY: Final = frozenset({"shares", "weights"})
#: Samples of those.
_SAMPLES: Final = 8
#: Figures that peers are measured for.
_RIVALS: Final = frozenset({"rate", "mix", "knob"})
#: Seconds for what is compiled ahead.
_AHEAD: Final = 180.0
#: Requests a second of the latency tenant.
_RATE: Final = {"cuda": 200.0, "cpu": 50.0}


def _measured(name: str, stage: Stage) -> dict[str, Any]:
    """One figure as plain data; what it raises is in it."""
    begun = time.perf_counter()
    try:
        found = FIGURES[name](stage)
    except Exception as error:
        traceback.print_exc()
        return {
            "failed": f"{type(error).__name__}: {str(error).strip()}"[:500],
            "seconds": time.perf_counter() - begun,
        }
    return {
        "rows": [row.data() for row in found.rows],
        "errors": list(found.errors),
        "notes": list(found.notes),
        "seconds": time.perf_counter() - begun,
        "data": dict(found.data),
    }


def _wanted(options: Options, figures: frozenset[str]) -> list[Wanted]:
    """The programs that these figures serve."""
    found: list[Wanted] = []
    if options.samples == 1 or figures - _HEAVY:
        crowd = figures & (_CROWDS if options.samples == 1 else _CROWDS - _HEAVY)
        names = options.models if crowd else options.models[:1]
        found = [Wanted(name, options.tenants, state.settings().max_bundle) for name in names]
    if options.samples > 1 and figures & _HEAVY:
        size = shares.BUNDLE
        found += [Wanted(name, size, size, samples=options.samples) for name in options.models]
    return found


def _compiled(options: Options, figures: Sequence[str], jobs: int, limit: float) -> dict[str, Any]:
    """Has the programs of these figures compiled for mux and the peers; what that took and came to."""
    begun = time.perf_counter()
    flags = ["--mux", *["--inductor"] * bool(_RIVALS.intersection(figures)), f"--device={options.device}"]
    flags.append(f"--dtype={str(options.dtype).removeprefix('torch.')}")
    wanted = _wanted(options, frozenset(figures))
    found = compile_ahead(wanted, jobs, limit, flags, lambda words: print(words, file=sys.stderr, flush=True))
    return {"seconds": time.perf_counter() - begun, "programs": found}


def run(
    options: Options,
    figures: Sequence[str],
    budget: float | None = None,
    save: Callable[[dict[str, Any]], object] = lambda report: None,
    ahead: int = 0,
) -> dict[str, Any]:
    """Measures figures one after another; one that fails is in the record with its error.

    Args:
        budget: seconds after which no other figure begins; those are in the record as not run.
        save: gets the record after each figure.
        ahead: processes that compile before anything is served; 0: none.
    """
    begun = time.perf_counter()
    report: dict[str, Any] = {
        "environment": measure.environment(options.device),
        "options": options.data(),
        "collector": {"mux": "idle", "peers": "off"},
        "figures": {},
    }
    if ahead:
        limit = _AHEAD if budget is None else min(_AHEAD, budget / 2)
        report["ahead"] = _compiled(options, figures, ahead, limit)
        save(report)
    stage = Stage(options)
    with configured(collector="idle"):
        try:
            for name in figures:
                if budget is not None and time.perf_counter() - begun > budget:
                    report["figures"][name] = {"failed": f"not run: the budget of {budget:g} s was spent"}
                else:
                    report["figures"][name] = found = _measured(name, stage)
                    print(f"{name}: {found['seconds']:.1f} s", file=sys.stderr, flush=True)
                report["warm-up"] = stage.settling
                report["seconds"] = time.perf_counter() - begun
                save(report)
        finally:
            stage.close()
    return report


def _remarks(name: str, found: Mapping[str, Any]) -> list[str]:
    """What failed and what is to be known, a line each."""
    failures = [found["failed"]] if "failed" in found else found["errors"]
    lines = [f"{name} FAILED: {words.splitlines()[0]}" for words in failures]
    return [*lines, *(f"{name}: {words}" for words in found.get("notes", ()))]


def table(report: Mapping[str, Any]) -> str:
    """Target and measurement, one line each; below it what failed."""
    rows: list[tuple[str, ...]] = [("figure", "what", "target", "measured", "")]
    remarks, verdicts = [], []
    for name, found in report["figures"].items():
        rows += [cells(name, row) for row in found.get("rows", ())]
        verdicts += [row["passed"] for row in found.get("rows", ())]
        remarks += _remarks(name, found)
    said, facts = report["options"], report["environment"]
    about = f"{', '.join(said['models'])}; {said['tenants']} tenants, {said['process']} arrivals"
    versions = f"torch {facts['torch']}, triton {facts['triton']}, commit {facts['commit']}"
    counts = f"{verdicts.count(True)} targets met, {verdicts.count(False)} missed"
    lost = sum("failed" in found for found in report["figures"].values())
    if lost:
        counts += f"; of {len(report['figures'])} figures {lost} not measured"
    remarks += _warmth(report.get("warm-up", ()))
    return "\n".join([f"{facts['device']}, {versions}", about, *measure.aligned(rows), *remarks, counts])


def _warmth(phases: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was warmed up before it was measured, in a line."""
    if not phases:
        return []
    spent, jobs = (sum(one[what] for one in phases) for what in ("seconds", "jobs"))
    restless = sum(not one["quiet"] for one in phases)
    words = f"warmed {len(phases)} kinds of traffic in {spent:.1f} s, with {jobs} compiles and captures"
    return [words + (f"; {restless} were not quiet in time" if restless else "")]


def failed(report: Mapping[str, Any]) -> bool:
    """Whether something could not be measured; a target that is missed was."""
    return any("failed" in found or found["errors"] for found in report["figures"].values())


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="torch-mux bench serve", description=__doc__)
    result.add_argument("--figures", default=None, help=f"of {', '.join(FIGURES)}; all by default")
    result.add_argument("--models", default=None, help="four workloads; the first is the one of all tenants")
    result.add_argument("--tenants", type=int, default=None, help="16, or 4 without a GPU")
    result.add_argument("--device", default=None, help="cuda or cpu")
    result.add_argument("--servers", default=None, help=f"peers, of {', '.join(PEERS)}")
    result.add_argument("--arrivals", default="poisson", choices=sorted(PROCESSES))
    result.add_argument("--bound", default=None, help="what p99 may take, 10ms (100ms without a GPU)")
    result.add_argument("--seconds", type=float, default=None, help="length of a run")
    words = f"samples a request where the device must be saturated: {', '.join(sorted(_HEAVY))}"
    result.add_argument("--samples", type=int, default=_SAMPLES, help=words)
    result.add_argument("--quick", action="store_true", help="shorter runs and fewer of them")
    result.add_argument("--budget", type=float, default=None, help="seconds after which no figure begins")
    words = "processes that compile ahead, 0 for none; two less than cores, on a GPU"
    result.add_argument("--ahead", type=int, default=None, help=words)
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--json", type=Path, default=None, help="write the record here, plots beside it")
    result.add_argument("--show", type=Path, default=None, help="print the table of this record instead")
    return result


def _names(
    flags: argparse.ArgumentParser, kind: str, given: str | None, known: Mapping[str, object]
) -> tuple[str, ...]:
    """Names from a list with commas; ends with a message where one is unknown."""
    names = tuple(dict.fromkeys(name.strip() for name in given.split(",") if name.strip())) if given else ()
    unknown = sorted(set(names) - set(known))
    if unknown:
        flags.error(f"unknown {kind} {', '.join(unknown)}; choose from {', '.join(known)}")
    return names


def _options(flags: argparse.ArgumentParser, given: argparse.Namespace) -> Options:
    name = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    measure.require_device(flags, name)
    device = torch.device(name)
    kind = device.type
    models = _names(flags, "models", given.models, WORKLOADS) or _MODELS[kind]
    if len(models) != 4:
        flags.error(f"--models takes four different workloads, not {len(models)}")
    tenants = (16 if kind == "cuda" else 4) if given.tenants is None else given.tenants
    seconds = _SECONDS[kind][given.quick] if given.seconds is None else given.seconds
    if tenants < 4 or seconds <= 0:
        flags.error("--tenants must be at least 4 and --seconds positive")
    if given.samples < 1:
        flags.error("--samples must be at least 1")
    try:
        bound = parse_duration(given.bound or ("10ms" if kind == "cuda" else "100ms"))
    except UnparsableQuantity as error:
        flags.error(f"--bound: {error}")
    return Options(
        models=models,
        tenants=tenants,
        device=device,
        dtype=DTYPES["float16" if kind == "cuda" else "float32"],
        servers=_names(flags, "servers", given.servers, PEERS) or default_peers(device),
        process=given.arrivals,
        bound=bound,
        seconds=seconds,
        steps=_STEPS[given.quick],
        rate=_RATE[kind],
        seed=given.seed,
        samples=given.samples,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, writes the record and its plots and prints the table; 1 where something was not measured."""
    flags = parser()
    arguments = flags.parse_args(argv)
    if arguments.show is not None:
        report = measure.read(flags, arguments.show)
        print(table(report))
        return int(failed(report))
    wanted = _names(flags, "figures", arguments.figures, FIGURES) or tuple(FIGURES)
    options = _options(flags, arguments)
    figures = [name for name in FIGURES if name in wanted]
    cores = max(1, (os.cpu_count() or 1) - 2) if options.device.type == "cuda" else 0
    ahead = cores if arguments.ahead is None else arguments.ahead
    if ahead < 0:
        flags.error("--ahead must not be negative")
    measure.announce(options.device)
    report = run(
        options,
        figures,
        arguments.budget,
        lambda found: measure.write(found, arguments.json),
        ahead,
    )
    print(table(report))
    if arguments.json is not None:
        draw(report, arguments.json)
    return int(failed(report))


if __name__ == "__main__":
    sys.exit(main())

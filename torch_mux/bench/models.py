"""Whole models against the peers: ``python -m torch_mux.bench.models --json out.json``.

Every contender answers one request of each tenant a round, at batch 1, with inputs that change and outputs
that are the caller's. Answers are compared with float64 before anything is timed, and a contender whose
answers are wrong is not timed. Repetitions of the contenders are interleaved, so that a machine that drifts
drifts for all of them; those that are processes of their own come last, one after another. All that there is
to measure: ``--models table --contenders all --measures all``.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import torch_mux
from torch_mux.bench import measure
from torch_mux.bench.contenders import CONTENDERS
from torch_mux.bench.contest import Contest, Options
from torch_mux.bench.measures import MEASURES, ROUNDS
from torch_mux.bench.models_table import table
from torch_mux.bench.workloads import CPU_TABLE, DTYPES, TABLE, WORKLOADS

__all__ = ["Options", "main", "run", "table"]

ALL = "all"
Save = Callable[[dict[str, Any]], object]


def run(options: Options, save: Save | None = None) -> dict[str, Any]:
    """Measure everything; plain data: one entry of ``results`` a model, contender and tenant count.

    ``measures`` has an entry a model and measure. ``save`` gets the report after every contender, repetition
    and measure. A contender that fails has its error in its entries under ``failed``; the others go on.
    """
    results: list[dict[str, Any]] = []
    measures: list[dict[str, Any]] = []
    start = time.monotonic()
    environment = measure.environment(options.device)

    def report(
        more: Sequence[dict[str, Any]] = (), measured: Sequence[dict[str, Any]] = ()
    ) -> dict[str, Any]:
        return {
            "environment": environment,
            "options": _plain(options),
            "results": [*results, *more],
            "measures": [*measures, *measured],
        }

    def saved(more: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]]) -> None:
        if save is not None:
            save(report(more, measured))

    for index, name in enumerate(options.models):
        share = None if options.budget is None else options.budget * (index + 1) / len(options.models)
        contest = Contest(name, options, None if share is None else start + share, saved)
        contest.run()
        results += contest.records.values()
        measures += contest.measured
        saved((), ())
        del contest
        torch_mux.reset()
        torch.compiler.reset()
        gc.collect()
        if options.device.type == "cuda":
            torch.cuda.empty_cache()
    return report()


def _plain(options: Options) -> dict[str, Any]:
    return {**vars(options), "device": str(options.device), "dtype": str(options.dtype)}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    cuda = torch.cuda.is_available()
    result = argparse.ArgumentParser(prog="torch-mux bench models", description=__doc__)
    result.add_argument(
        "--models",
        default=None,
        help=f"comma-separated: {', '.join(WORKLOADS)}; NAME@1/4/16 for numbers of tenants of its own; "
        "'table' for those of the kept record, or for small ones without a GPU",
    )
    result.add_argument(
        "--tenants", default=None, help="comma-separated numbers of tenants a round; 16, or 4 without a GPU"
    )
    result.add_argument("--contenders", default="", help=f"comma-separated, or all: {', '.join(CONTENDERS)}")
    result.add_argument(
        "--measures",
        default=ROUNDS,
        help=f"comma-separated, or all: {ROUNDS} of every contender; of torch-mux {', '.join(MEASURES)}",
    )
    result.add_argument("--device", default="cuda" if cuda else "cpu")
    result.add_argument("--dtype", default=None, choices=sorted(DTYPES))
    result.add_argument("--repetitions", type=int, default=5)
    result.add_argument("--rounds", type=int, default=200, help="rounds of one pipelined repetition")
    result.add_argument("--channels-last", action="store_true")
    result.add_argument("--tiny", action="store_true", help="small models, to try the harness itself")
    result.add_argument("--budget", type=float, default=None, help="seconds; repetitions are shed to keep it")
    result.add_argument(
        "--limit", type=float, default=600.0, help="seconds to prepare a contender, or for a measure; 600"
    )
    result.add_argument(
        "--preparing", type=float, default=None, help="seconds to prepare all contenders of a model"
    )
    result.add_argument("--json", type=Path, default=None, help="write the record here")
    return result


def options_from(arguments: argparse.Namespace) -> Options:
    """Options from the command line.

    ``--tiny``, or no GPU and no models named, picks the small models; these and a CPU run in float32.

    Raises:
        ValueError: a number of tenants that is none.
    """
    device = torch.device(arguments.device)
    cpu = device.type == "cpu"
    small = arguments.tiny or (cpu and arguments.models in (None, "table"))
    given = arguments.models or ("tiny-cnn,tiny-encoder" if small else "resnet50,bert,vit")
    counts: dict[str, tuple[int, ...]] = {}
    if given == "table":
        counts = dict(CPU_TABLE if small else TABLE)
        models = tuple(counts)
    else:
        named = [name.partition("@") for name in given.split(",")]
        models = tuple(dict.fromkeys(name for name, _, _ in named))
        counts = {name: _numbers(own, "/") for name, at, own in named if at}
    return Options(
        models=models,
        tenants=_numbers(arguments.tenants or ("4" if cpu else "16"), ","),
        counts=counts,
        contenders=_names(arguments.contenders, tuple(CONTENDERS)),
        measures=_names(arguments.measures, (ROUNDS, *MEASURES)),
        device=device,
        dtype=DTYPES[arguments.dtype or ("float32" if small or cpu else "float16")],
        repetitions=arguments.repetitions,
        rounds=arguments.rounds,
        channels_last=arguments.channels_last,
        budget=arguments.budget,
        limit=arguments.limit,
        preparing=arguments.preparing,
    )


def _numbers(text: str, separator: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(int(count) for count in text.split(separator)))


def _names(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    return known if text == ALL else tuple(dict.fromkeys(name for name in text.split(",") if name))


def checked(flags: argparse.ArgumentParser, arguments: argparse.Namespace) -> Options:
    """Options whose every name and number makes sense; else a message and exit code 2."""
    measure.require_device(flags, arguments.device)
    try:
        options = options_from(arguments)
    except ValueError:
        words = f"--tenants {arguments.tenants!r} or --models {arguments.models!r}"
        flags.error(f"{words} is not a list of whole numbers such as 1,4,16 and bert@1/4/16")
    for kind, given, known in (
        ("model", options.models, [*WORKLOADS, "table"]),
        ("contender", options.contenders, [*CONTENDERS, ALL]),
        ("measure", options.measures, [ROUNDS, *MEASURES, ALL]),
    ):
        unknown = [name for name in given if name not in known or name in ("table", ALL)]
        if unknown:
            flags.error(f"unknown {kind} {', '.join(unknown)}; choose from {', '.join(known)}")
    if not options.measures:
        flags.error("--measures names nothing to measure")
    counts = [count for name in options.models for count in options.counts_of(name)]
    if min(*counts, options.repetitions, options.rounds) < 1:
        flags.error("--tenants, --repetitions and --rounds must be at least 1")
    for flag, seconds in (("--limit", options.limit), ("--preparing", options.preparing)):
        if seconds is not None and seconds <= 0:
            flags.error(f"{flag} must be more than 0 seconds")
    besides = [name for name in options.measures if name != ROUNDS]
    if besides and not {"mux", "mux-raw"} & set(options.names()):
        flags.error(f"--measures {', '.join(besides)} measure torch-mux: add mux to --contenders")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the record, and print the table last; 1 where a contender or a measure failed."""
    flags = parser()
    arguments = flags.parse_args(argv)
    options = checked(flags, arguments)
    if options.device.type == "cpu":
        sizes = [f"{name} at {', '.join(map(str, options.counts_of(name)))}" for name in options.models]
        print(f"no GPU is used: measuring on the CPU ({'; '.join(sizes)} tenants)", file=sys.stderr)
    measure.announce(options.device)
    report = run(options, lambda found: measure.write(found, arguments.json))
    print(table(report))
    return int(any("failed" in record for record in [*report["results"], *report["measures"]]))


if __name__ == "__main__":
    sys.exit(main())

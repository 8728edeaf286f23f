"""Whole models against the peers: ``python -m torch_mux.bench.models --json out.json``.

Every contender answers one request of each tenant a round, at batch 1, with inputs that change and outputs
that are the caller's. Answers are compared with float64 before anything is timed. Repetitions of the
contenders are interleaved, so that a machine that drifts drifts for all of them.
"""

from __future__ import annotations

import argparse
import functools
import gc
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torch_mux
from torch_mux.bench import measure
from torch_mux.bench.contenders import CONTENDERS, Contender, Mux, default_contenders
from torch_mux.bench.host import gather_parts
from torch_mux.bench.workloads import DTYPES, WORKLOADS, Tenants, build

__all__ = ["Options", "main", "run", "table"]


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        models: names in ``WORKLOADS``.
        tenants: numbers of tenants a round.
        contenders: names in ``CONTENDERS``; empty for the device's usual ones.
        device, dtype: where and in what precision the models run.
        repetitions: most interleaved repetitions of each measurement.
        rounds: rounds of one pipelined repetition; a quarter of them when synchronised.
        channels_last: weights and images of every contender in channels-last order.
        budget: seconds in all; repetitions beyond the first of a model are shed to keep it. None: no limit.
    """

    models: tuple[str, ...] = ("resnet50", "bert", "vit")
    tenants: tuple[int, ...] = (16,)
    contenders: tuple[str, ...] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cuda"))
    dtype: torch.dtype = torch.float16
    repetitions: int = 5
    rounds: int = 200
    channels_last: bool = False
    budget: float | None = None


Save = Callable[[dict[str, Any]], object]


def run(options: Options, save: Save | None = None) -> dict[str, Any]:
    """Measure everything; plain data: one entry of ``results`` a model, contender and tenant count.

    ``save`` gets the report after every contender and every repetition. A contender that fails has its error
    in its entries under ``failed``; the others go on.
    """
    results: list[dict[str, Any]] = []
    start = time.monotonic()
    environment = measure.environment(options.device)

    def report(more: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        return {"environment": environment, "options": _plain(options), "results": [*results, *more]}

    def saved(more: Sequence[dict[str, Any]]) -> None:
        if save is not None:
            save(report(more))

    for index, name in enumerate(options.models):
        share = None if options.budget is None else options.budget * (index + 1) / len(options.models)
        contest = _Contest(name, options, None if share is None else start + share, saved)
        results += contest.run()
        saved(())
        del contest
        torch_mux.reset()
        torch.compiler.reset()
        gc.collect()
        if options.device.type == "cuda":
            torch.cuda.empty_cache()
    return report()


def _plain(options: Options) -> dict[str, Any]:
    return {**vars(options), "device": str(options.device), "dtype": str(options.dtype)}


class _Contest:
    """All contenders over one architecture.

    Args:
        name: of the workload.
        deadline: on ``time.monotonic``, after which no further repetition starts.
        saved: gets the records as they are, again and again.
    """

    def __init__(
        self,
        name: str,
        options: Options,
        deadline: float | None,
        saved: Callable[[Sequence[dict[str, Any]]], None],
    ) -> None:
        self.options, self.deadline, self.saved = options, deadline, saved
        keys = options.contenders or default_contenders(options.device)
        self.contenders: dict[str, Contender] = {key: CONTENDERS[key]() for key in keys}
        self.records = {
            (key, count): {"model": name, "contender": contender.name, "tenants": count}
            for key, contender in self.contenders.items()
            for count in options.tenants
        }
        self.name = name

    def run(self) -> list[dict[str, Any]]:
        """Prepares the contenders one after another, checks their answers, then times them taking turns."""
        options = self.options
        with torch.no_grad():
            tenants = build(
                WORKLOADS[self.name],
                max(options.tenants),
                options.device,
                options.dtype,
                channels_last=options.channels_last,
            )
            exact = measure.references(tenants)
        with torch.inference_mode():
            for key in list(self.contenders):
                self._attempt(key, functools.partial(self._prepare, key, tenants, exact))
                self.saved(list(self.records.values()))
            self._time(tenants)
            for key in list(self.contenders):
                self._attempt(key, self.contenders[key].release)
        return list(self.records.values())

    def _attempt(self, key: str, step: Callable[[], object]) -> None:
        """One step of one contender; an error takes it out of the contest and into the record."""
        try:
            step()
        except Exception as error:
            traceback.print_exc()
            for count in self.options.tenants:
                words = f"{type(error).__name__}: {str(error).strip()}"
                self.records[key, count]["failed"] = words[:500]
            self.contenders.pop(key)

    def _prepare(self, key: str, tenants: Tenants, exact: list[list[Tensor]]) -> None:
        contender = self.contenders[key]
        counts = tuple(sorted(self.options.tenants, reverse=True))
        start = time.perf_counter()
        prepare = functools.partial(contender.prepare, tenants, counts)
        extra = measure.memory_of(prepare, self.options.device)
        seconds = time.perf_counter() - start
        for count in self.options.tenants:
            record = self.records[key, count]
            record["notes"] = contender.notes()
            record["prepare_seconds"] = round(seconds, 2)
            record["error"] = measure.errors(contender, tenants, exact, count)
            record["launches"] = measure.launches(contender, tenants, count)
            record["memory"] = {
                "weights": tenants.weight_bytes(),
                "tenants": len(tenants.models),
                "extra": extra,
            }
            if isinstance(contender, Mux):
                record["host_us"] = gather_parts(contender, tenants, count)

    def _time(self, tenants: Tenants) -> None:
        """Fill in the times, the contenders taking turns; a short first turn warms up and is dropped."""
        options = self.options
        piped: dict[tuple[str, int], list[float]] = {place: [] for place in self.records}
        waited: dict[tuple[str, int], list[float]] = {place: [] for place in self.records}

        def turn(place: tuple[str, int], rounds: int) -> None:
            contender, (_, count) = self.contenders[place[0]], place
            piped[place].append(measure.pipelined(contender, tenants, count, rounds))
            waited[place].append(measure.synchronised(contender, tenants, count, max(1, rounds // 4)))

        for repetition in range(options.repetitions + 1):
            late = self.deadline is not None and time.monotonic() > self.deadline
            if late and repetition > 1:
                break
            for place, record in self.records.items():
                if place[0] not in self.contenders:
                    continue
                rounds = options.rounds if repetition else max(1, options.rounds // 20)
                self._attempt(place[0], functools.partial(turn, place, rounds))
                if not repetition:
                    piped[place].clear()
                    waited[place].clear()
                elif place[0] in self.contenders:
                    record["pipelined_us"] = measure.Spread.of(piped[place]).data()
                    record["synchronised_us"] = measure.Spread.of(waited[place]).data()
                    record["repetitions"] = repetition
            self.saved(list(self.records.values()))


HEADER = (
    *("model", "tenants", "contender", "pipelined µs", "(min-max)", "synchronised µs", "(min-max)"),
    *("l2 error", "kernels", "extra MiB/tenant"),
)


def table(report: dict[str, Any]) -> str:
    """The results as plain text, one line a model, tenant count and contender; one that failed says why."""
    lines = sorted(report["results"], key=lambda record: (record["model"], record["tenants"]))
    rows = [HEADER, *map(_cells, lines)]
    facts = report["environment"]
    title = f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, commit {facts['commit']}"
    failed = dict.fromkeys(
        f"{record['model']}: {record['contender']} failed: {record['failed']}"
        for record in lines
        if "failed" in record
    )
    return "\n".join([title, *measure.aligned(rows), *failed])


def _cells(record: dict[str, Any]) -> tuple[str, ...]:
    name = (record["model"], str(record["tenants"]), record["contender"])
    if "failed" in record:
        return (*name, "failed", *["-"] * (len(HEADER) - len(name) - 1))
    launched = record["launches"]
    extra = record["memory"]["extra"]["allocated"] / record["memory"]["tenants"] / 2**20
    times = (_spread(record.get(kind)) for kind in ("pipelined_us", "synchronised_us"))
    return (
        *name,
        *(cell for pair in times for cell in pair),
        f"{record['error']['mean']:.2e}",
        "-" if launched is None else str(launched["kernels"]),
        f"{extra:.1f}",
    )


def _spread(found: dict[str, float] | None) -> tuple[str, str]:
    if found is None:  # not timed yet
        return "-", "-"
    return f"{found['median']:.0f}", f"({found['low']:.0f}-{found['high']:.0f})"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    cuda = torch.cuda.is_available()
    result = argparse.ArgumentParser(prog="python -m torch_mux.bench.models", description=__doc__)
    result.add_argument("--models", default=None, help=f"comma-separated: {', '.join(WORKLOADS)}")
    result.add_argument(
        "--tenants", default=None, help="comma-separated numbers of tenants a round; 16, or 4 without a GPU"
    )
    result.add_argument("--contenders", default="", help=f"comma-separated: {', '.join(CONTENDERS)}")
    result.add_argument("--device", default="cuda" if cuda else "cpu")
    result.add_argument("--dtype", default=None, choices=sorted(DTYPES))
    result.add_argument("--repetitions", type=int, default=5)
    result.add_argument("--rounds", type=int, default=200, help="rounds of one pipelined repetition")
    result.add_argument("--channels-last", action="store_true")
    result.add_argument("--tiny", action="store_true", help="small models, to try the harness itself")
    result.add_argument("--budget", type=float, default=None, help="seconds; repetitions are shed to keep it")
    result.add_argument("--json", type=Path, default=None, help="write the record here")
    return result


def options_from(arguments: argparse.Namespace) -> Options:
    """Options from the command line.

    ``--tiny``, or no GPU and no models named, picks the small models; these and a CPU run in float32.
    """
    device = torch.device(arguments.device)
    cpu = device.type == "cpu"
    small = arguments.tiny or (cpu and arguments.models is None)
    models = arguments.models or ("tiny-cnn,tiny-encoder" if small else "resnet50,bert,vit")
    tenants = arguments.tenants or ("4" if cpu else "16")
    return Options(
        models=tuple(models.split(",")),
        tenants=tuple(int(count) for count in tenants.split(",")),
        contenders=tuple(name for name in arguments.contenders.split(",") if name),
        device=device,
        dtype=DTYPES[arguments.dtype or ("float32" if small or cpu else "float16")],
        repetitions=arguments.repetitions,
        rounds=arguments.rounds,
        channels_last=arguments.channels_last,
        budget=arguments.budget,
    )


def checked(flags: argparse.ArgumentParser, arguments: argparse.Namespace) -> Options:
    """Options whose every name and number makes sense; else a message and exit code 2."""
    measure.require_device(flags, arguments.device)
    try:
        options = options_from(arguments)
    except ValueError:
        flags.error(f"--tenants {arguments.tenants!r} is not a list of whole numbers such as 1,4,16")
    for kind, given, known in (
        ("model", options.models, WORKLOADS),
        ("contender", options.contenders, CONTENDERS),
    ):
        unknown = [name for name in given if name not in known]
        if unknown:
            flags.error(f"unknown {kind} {', '.join(unknown)}; choose from {', '.join(known)}")
    if min(options.tenants) < 1 or options.repetitions < 1 or options.rounds < 1:
        flags.error("--tenants, --repetitions and --rounds must be at least 1")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the record, and print the table last; 1 where a contender failed."""
    flags = parser()
    arguments = flags.parse_args(argv)
    options = checked(flags, arguments)
    if options.device.type == "cpu":
        sizes = f"{', '.join(options.models)}; {', '.join(map(str, options.tenants))} tenants"
        print(f"no GPU is used: measuring on the CPU ({sizes})", file=sys.stderr)
    measure.announce(options.device)
    report = run(options, lambda found: measure.write(found, arguments.json))
    print(table(report))
    return int(any("failed" in record for record in report["results"]))


if __name__ == "__main__":
    sys.exit(main())

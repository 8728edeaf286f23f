"""Whole models against the peers: ``python -m torch_mux.bench.models --json out.json``.

Every contender answers one request of each tenant a round, at batch 1, with inputs that change and outputs
that are the caller's. Answers are compared with float64 before anything is timed. Repetitions of the
contenders are interleaved, so that a machine that drifts drifts for all of them.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torch_mux
from torch_mux.bench import measure
from torch_mux.bench.contenders import CONTENDERS, Contender, default_contenders
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
        repetitions: interleaved repetitions of each measurement.
        rounds: rounds of one pipelined repetition; a quarter of them when synchronised.
        channels_last: weights and images of every contender in channels-last order.
    """

    models: tuple[str, ...] = ("resnet50", "bert", "vit")
    tenants: tuple[int, ...] = (16,)
    contenders: tuple[str, ...] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cuda"))
    dtype: torch.dtype = torch.float16
    repetitions: int = 5
    rounds: int = 200
    channels_last: bool = False


def run(options: Options, save: Callable[[dict[str, Any]], object] | None = None) -> dict[str, Any]:
    """Measure everything; plain data: one entry of ``results`` a model, contender and tenant count.

    ``save`` gets the report after each model.
    """
    results: list[dict[str, Any]] = []
    for name in options.models:
        results += _workload(name, options)
        if save is not None:
            save(_report(options, results))
        torch_mux.reset()
        torch.compiler.reset()
        gc.collect()
        if options.device.type == "cuda":
            torch.cuda.empty_cache()
    return _report(options, results)


def _report(options: Options, results: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "environment": measure.environment(options.device),
        "options": _plain(options),
        "results": list(results),
    }


def _plain(options: Options) -> dict[str, Any]:
    return {**vars(options), "device": str(options.device), "dtype": str(options.dtype)}


def _workload(name: str, options: Options) -> list[dict[str, Any]]:
    """All contenders over one architecture."""
    tenants = build(
        WORKLOADS[name],
        max(options.tenants),
        options.device,
        options.dtype,
        channels_last=options.channels_last,
    )
    with torch.no_grad():
        exact = measure.references(tenants)
    with torch.inference_mode():
        return _contend(tenants, exact, options)


def _contend(tenants: Tenants, exact: list[list[Tensor]], options: Options) -> list[dict[str, Any]]:
    """Prepare the contenders one after another, check their answers, then time them taking turns."""
    counts = tuple(sorted(options.tenants, reverse=True))
    contenders: dict[str, Contender] = {}
    records: dict[tuple[str, int], dict[str, Any]] = {}
    for key in options.contenders or default_contenders(options.device):
        contender = contenders[key] = CONTENDERS[key]()
        prepare = functools.partial(contender.prepare, tenants, counts)
        extra = measure.memory_of(prepare, options.device)
        for count in options.tenants:
            record = records[key, count] = _record(contender, tenants, count)
            record["error"] = measure.errors(contender, tenants, exact, count)
            record["launches"] = measure.launches(contender, tenants, count)
            record["memory"] = {
                "weights": tenants.weight_bytes(),
                "tenants": len(tenants.models),
                "extra": extra,
            }
    _time(contenders, records, tenants, options)
    for contender in contenders.values():
        contender.release()
    return list(records.values())


def _record(contender: Contender, tenants: Tenants, count: int) -> dict[str, Any]:
    return {
        "model": tenants.workload.name,
        "contender": contender.name,
        "tenants": count,
        "notes": contender.notes(),
    }


def _time(
    contenders: dict[str, Contender],
    records: dict[tuple[str, int], dict[str, Any]],
    tenants: Tenants,
    options: Options,
) -> None:
    """Fill in the times, the contenders taking turns."""
    piped: dict[tuple[str, int], list[float]] = {key: [] for key in records}
    waited: dict[tuple[str, int], list[float]] = {key: [] for key in records}
    for repetition in range(options.repetitions + 1):
        for key, count in records:
            rounds = options.rounds if repetition else max(1, options.rounds // 10)
            first = measure.pipelined(contenders[key], tenants, count, rounds)
            second = measure.synchronised(contenders[key], tenants, count, max(1, rounds // 4))
            if repetition:  # the first one warms up
                piped[key, count].append(first)
                waited[key, count].append(second)
    for place, record in records.items():
        record["pipelined_us"] = measure.Spread.of(piped[place]).data()
        record["synchronised_us"] = measure.Spread.of(waited[place]).data()


HEADER = (
    *("model", "tenants", "contender", "pipelined µs", "(min-max)", "synchronised µs", "(min-max)"),
    *("l2 error", "kernels", "extra MiB/tenant"),
)


def table(report: dict[str, Any]) -> str:
    """The results as plain text, one line a model, tenant count and contender."""
    rows: list[tuple[str, ...]] = [HEADER]
    for record in sorted(report["results"], key=lambda r: (r["model"], r["tenants"])):
        piped, waited = record["pipelined_us"], record["synchronised_us"]
        launched = record["launches"]
        extra = record["memory"]["extra"]["allocated"] / record["memory"]["tenants"] / 2**20
        rows.append(
            (
                record["model"],
                str(record["tenants"]),
                record["contender"],
                f"{piped['median']:.0f}",
                f"({piped['low']:.0f}-{piped['high']:.0f})",
                f"{waited['median']:.0f}",
                f"({waited['low']:.0f}-{waited['high']:.0f})",
                f"{record['error']['mean']:.2e}",
                "-" if launched is None else str(launched["kernels"]),
                f"{extra:.1f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    facts = report["environment"]
    title = f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, commit {facts['commit']}"
    return "\n".join([title, *lines])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    cuda = torch.cuda.is_available()
    result = argparse.ArgumentParser(prog="python -m torch_mux.bench.models", description=__doc__)
    result.add_argument("--models", default=None, help=f"comma-separated: {', '.join(WORKLOADS)}")
    result.add_argument("--tenants", default="16", help="comma-separated numbers of tenants a round")
    result.add_argument("--contenders", default="", help=f"comma-separated: {', '.join(CONTENDERS)}")
    result.add_argument("--device", default="cuda" if cuda else "cpu")
    result.add_argument("--dtype", default=None, choices=sorted(DTYPES))
    result.add_argument("--repetitions", type=int, default=5)
    result.add_argument("--rounds", type=int, default=200, help="rounds of one pipelined repetition")
    result.add_argument("--channels-last", action="store_true")
    result.add_argument("--tiny", action="store_true", help="small models, to try the harness itself")
    result.add_argument("--json", type=Path, default=None, help="write the record here")
    return result


def options_from(arguments: argparse.Namespace) -> Options:
    """Options from the command line; ``--tiny`` picks the small models in float32."""
    models = arguments.models or ("tiny-cnn,tiny-encoder" if arguments.tiny else "resnet50,bert,vit")
    device = torch.device(arguments.device)
    small = arguments.tiny or device.type == "cpu"
    return Options(
        models=tuple(models.split(",")),
        tenants=tuple(int(count) for count in arguments.tenants.split(",")),
        contenders=tuple(name for name in arguments.contenders.split(",") if name),
        device=device,
        dtype=DTYPES[arguments.dtype or ("float32" if small else "float16")],
        repetitions=arguments.repetitions,
        rounds=arguments.rounds,
        channels_last=arguments.channels_last,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the record, and print the table last."""
    flags = parser()
    arguments = flags.parse_args(argv)
    options = options_from(arguments)
    for kind, given, known in (
        ("model", options.models, WORKLOADS),
        ("contender", options.contenders, CONTENDERS),
    ):
        unknown = [name for name in given if name not in known]
        if unknown:
            flags.error(f"unknown {kind} {', '.join(unknown)}; choose from {', '.join(known)}")

    def save(report: dict[str, Any]) -> None:
        if arguments.json is not None:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(report, indent=1, default=str) + "\n")

    print(table(run(options, save)))


if __name__ == "__main__":
    main()

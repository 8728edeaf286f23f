"""Several architectures at once: ``python -m torch_mux.bench.mix --json mix.json``.

Every contender answers one request of each tenant a round, at batch 1. Peers are Inductor's graphs, one after
another and as forked branches of one CUDA graph; ours are the programs' own plans one after another; the same
on branches, without parts of the device and with; in one captured graph beside each other under caps
(``beside``), and with matching launches made one (``packed``); and ``auto``, what a user gets: branches, and
one graph where that was measured to be faster. Of sequences of several lengths there is one more, ``padded``:
all of them as long as the longest, and coalesced. Answers are compared with float64 first, and repetitions
take turns.

Programs are compiled ahead by processes side by side (``--ahead``), each contender has ``--limit`` seconds to
be prepared, and ``--budget`` bounds all: what it does not reach is in the record with that reason.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import torch_mux
from torch_mux.bench import measure
from torch_mux.bench.ahead import Wanted, compile_ahead
from torch_mux.bench.contenders import Contender, NotApplicable
from torch_mux.bench.limits import within
from torch_mux.bench.mix_contenders import CONTENDERS, OURS, MuxMix, Padded, settle
from torch_mux.bench.mix_rows import ROWS, Pool, Row, longest_of
from torch_mux.bench.mix_table import table
from torch_mux.bench.mix_trace import traced
from torch_mux.bench.right import allowed, verify
from torch_mux.bench.workloads import DTYPES, Tenants

__all__ = ["CONTENDERS", "Options", "main", "run", "table"]


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        rows: names in :data:`ROWS`.
        contenders: names in :data:`CONTENDERS`.
        device, dtype: where and in what precision the models run.
        repetitions: interleaved repetitions of each measurement.
        rounds: rounds of one pipelined repetition; a quarter of them when synchronised.
        budget: seconds in all; what compiling ahead leaves is divided among the rows. Repetitions,
            and then contenders, are shed to keep it. None: no limit.
        limit: seconds that one contender may take to be prepared. None: no limit.
        ahead: processes that compile programs before any is served; 0: none.
        trace: a folder for a timeline and the explanation of each row under each contender of ours.
    """

    rows: tuple[str, ...]
    contenders: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    repetitions: int = 5
    rounds: int = 100
    budget: float | None = None
    limit: float | None = None
    ahead: int = 0
    trace: Path | None = None


Record = dict[str, Any]


def run(options: Options, save: Callable[[Record], object] | None = None) -> Record:
    """Measures everything; plain data, one entry of ``results`` a row and contender.

    ``save`` gets the report after every contender and every repetition. A contender that fails has its error
    in its entry; the others go on.
    """
    started = time.monotonic()
    report: Record = {
        "environment": measure.environment(options.device),
        "options": _said(options),
        "results": [],
    }
    rows = [ROWS[name] for name in options.rows]
    if options.ahead:
        report["ahead"] = _ahead(rows, options)
    pool = Pool(rows, options.device, options.dtype)
    begun = time.monotonic()
    left = None if options.budget is None else max(0.0, started + options.budget - begun)
    with torch.inference_mode():
        for number, row in enumerate(rows):
            deadline = None if left is None else begun + left * (number + 1) / len(rows)
            torch_mux.configure(max_bundle=_bundle(row, options))
            _row(row, options, pool, deadline, report["results"], lambda: save(report) if save else None)
            report["seconds"] = round(time.monotonic() - started, 1)
            gc.collect()
    return report


def _said(options: Options) -> Record:
    """Plain data for JSON; a folder by its name."""
    trace = None if options.trace is None else options.trace.name
    return {**vars(options), "device": str(options.device), "dtype": str(options.dtype), "trace": trace}


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def _bundle(row: Row, options: Options) -> int:
    """Most requests of one program that a row has."""
    padded = "padded" in options.contenders and longest_of(row) is not None
    return row.tenants if padded else max(count for _, count in row.members)


def _ahead(rows: Sequence[Row], options: Options) -> Record:
    """Has every program of the rows compiled; what that took and came to."""
    begun = time.monotonic()
    ours, peers = (any((key in OURS) == kind for key in options.contenders) for kind in (True, False))
    flags = [f"--device={options.device}", f"--dtype={str(options.dtype).removeprefix('torch.')}"]
    flags += ["--mux"] * ours + ["--inductor"] * peers
    wanted = {
        (name, False): Wanted(name, count, _bundle(row, options))
        for row in rows
        for name, count in row.members
    }
    for row in rows:
        longest = longest_of(row)
        if longest is not None and "padded" in options.contenders:
            wanted[longest, True] = Wanted(longest, row.tenants, row.tenants, masked=True)
    limit = options.limit or 120.0
    if options.budget is not None:
        limit = min(limit, options.budget / 2)
    _say(f"{len(wanted)} programs are compiled ahead by {options.ahead} processes")
    found = compile_ahead(list(wanted.values()), options.ahead, limit, flags, _say)
    return {"seconds": round(time.monotonic() - begun, 1), "programs": found}


def _row(
    row: Row,
    options: Options,
    pool: Pool,
    deadline: float | None,
    results: list[Record],
    save: Callable[[], object],
) -> None:
    contenders: dict[str, Contender] = {}
    records: dict[str, Record] = {}
    _say(f"{row.name}: {row.tenants} models and their answers in float64")
    tenants = pool.tenants(row)
    exact = measure.references(tenants)
    bound = allowed(tenants, exact, row.tenants, options.dtype)
    for key in options.contenders:
        contender = CONTENDERS[key]()
        record = records[key] = {"row": row.name, "contender": contender.name, "tenants": row.tenants}
        results.append(record)
        if deadline is not None and time.monotonic() > deadline:
            record["skipped"] = f"the budget of {options.budget:g} s was spent before it was prepared"
            continue
        _say(f"{row.name}: {contender.name} is prepared")
        begun = time.perf_counter()
        try:
            with within(_seconds(options, deadline), f"preparing {key} for {row.name}"):
                contender.prepare(tenants, [row.tenants])
            record["error"] = found = measure.errors(contender, tenants, exact, row.tenants)
            verify(found, row.tenants, bound)
            record["kernels"] = kernels(contender, tenants, row.tenants)
            record["notes"] = contender.notes()
            contenders[key] = contender
        except NotApplicable as error:
            record["skipped"] = str(error)
        except Exception as error:
            traceback.print_exc()
            record["failed"] = f"{type(error).__name__}: {error}"[:500]
        record["prepare_seconds"] = round(time.perf_counter() - begun, 1)
        _say(f"{row.name}: {contender.name}: {record['prepare_seconds']} s")
        save()
    _timed(contenders, records, tenants, options, deadline, save)
    _traced(row, contenders, records, tenants, options)
    for contender in contenders.values():
        contender.release()


def _traced(
    row: Row,
    contenders: dict[str, Contender],
    records: dict[str, Record],
    tenants: Tenants,
    options: Options,
) -> None:
    """Timelines, where they are wanted; one that fails is told in its contender's entry."""
    for key, contender in contenders.items():
        if options.trace is None or not isinstance(contender, MuxMix) or isinstance(contender, Padded):
            continue
        try:
            traced(contender, row, tenants, options.trace / f"{row.name}-{key}.json")
        except Exception as error:
            traceback.print_exc()
            records[key]["not traced"] = f"{type(error).__name__}: {error}"[:500]


def _seconds(options: Options, deadline: float | None) -> float | None:
    """How long a contender may take to be prepared now: the limit, or what is left of the row's budget."""
    left = [] if deadline is None else [max(1.0, deadline - time.monotonic())]
    return min([*left, *([] if options.limit is None else [options.limit])], default=None)


def _timed(
    contenders: dict[str, Contender],
    records: dict[str, dict[str, Any]],
    tenants: Tenants,
    options: Options,
    deadline: float | None,
    save: Callable[[], object],
) -> None:
    """The contenders take turns; the first turn warms up and is dropped."""
    piped: dict[str, list[float]] = {key: [] for key in contenders}
    waited: dict[str, list[float]] = {key: [] for key in contenders}
    for repetition in range(options.repetitions + 1):
        _say(f"repetition {repetition} of {options.repetitions}")
        if repetition > 1 and deadline is not None and time.monotonic() > deadline:
            break
        rounds = options.rounds if repetition else max(4, options.rounds // 10)
        for key, contender in contenders.items():
            settle(contender, tenants)
            one = measure.pipelined(contender, tenants, len(tenants.models), rounds)
            two = measure.synchronised(contender, tenants, len(tenants.models), max(1, rounds // 4))
            if repetition:
                piped[key].append(one)
                waited[key].append(two)
                records[key]["pipelined_us"] = measure.Spread.of(piped[key]).data()
                records[key]["synchronised_us"] = measure.Spread.of(waited[key]).data()
                records[key]["repetitions"] = repetition
        save()


def kernels(contender: Contender, tenants: Tenants, count: int) -> dict[str, float] | None:
    """Of one round by the profiler: kernels, those of several programs, and how much they overlap.

    ``overlap`` is the time of all kernels over the time in which any ran. None on a CPU.
    """
    row = tenants.requests[0][:count]
    if not row[0][0].is_cuda:
        return None
    contender.round(row)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        contender.round(row)
        torch.cuda.synchronize()
    events = [event for event in profiler.events() or [] if event.device_type.name == "CUDA"]
    events = [event for event in events if not str(event.name).startswith(("Memcpy", "Memset"))]
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    busy, reached = 0.0, float("-inf")
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return {
        "kernels": len(events),
        "of several programs": sum("joint_" in str(event.name) for event in events),
        "overlap": sum(end - start for start, end in spans) / busy if busy else 0.0,
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    cuda = torch.cuda.is_available()
    result = argparse.ArgumentParser(prog="torch-mux bench mix", description=__doc__)
    result.add_argument("--rows", default="four,encoders" if cuda else "tiny", help=f"of {', '.join(ROWS)}")
    peers = "serial,branches,beside,packed,padded,forked" if cuda else "inductor,serial,branches,packed"
    result.add_argument("--contenders", default=peers, help=f"of {', '.join(CONTENDERS)}")
    result.add_argument("--device", default="cuda" if cuda else "cpu")
    result.add_argument("--dtype", default="float16" if cuda else "float32", choices=sorted(DTYPES))
    result.add_argument("--repetitions", type=int, default=5)
    result.add_argument("--rounds", type=int, default=100, help="rounds of one pipelined repetition")
    result.add_argument("--budget", type=float, default=None, help="seconds in all, shed to keep them")
    result.add_argument("--limit", type=float, default=180.0, help="seconds to prepare one contender")
    ahead = max(1, (os.cpu_count() or 1) - 2) if cuda else 0
    result.add_argument("--ahead", type=int, default=ahead, help="processes that compile ahead; 0 for none")
    result.add_argument("--trace", type=Path, default=None, help="a folder for timelines and explanations")
    result.add_argument("--json", type=Path, default=None, help="write the record here")
    return result


def checked(flags: argparse.ArgumentParser, arguments: argparse.Namespace) -> Options:
    """Options whose every name and number makes sense; else a message and exit code 2."""
    measure.require_device(flags, arguments.device)
    rows, contenders = (tuple(text.split(",")) for text in (arguments.rows, arguments.contenders))
    for kind, given, known in (("row", rows, ROWS), ("contender", contenders, CONTENDERS)):
        unknown = [name for name in given if name not in known]
        if unknown:
            flags.error(f"unknown {kind} {', '.join(unknown)}; choose from {', '.join(known)}")
    if arguments.repetitions < 1 or arguments.rounds < 1:
        flags.error("--repetitions and --rounds must be at least 1")
    if arguments.limit <= 0 or arguments.ahead < 0 or (arguments.budget or 1.0) <= 0:
        flags.error("--limit and --budget must be positive, --ahead not negative")
    return Options(
        rows,
        contenders,
        torch.device(arguments.device),
        DTYPES[arguments.dtype],
        arguments.repetitions,
        arguments.rounds,
        arguments.budget,
        arguments.limit,
        arguments.ahead,
        arguments.trace,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, writes the record, and prints the table last; 1 where a contender failed."""
    flags = parser()
    arguments = flags.parse_args(argv)
    options = checked(flags, arguments)
    measure.announce(options.device)
    report = run(options, partial(measure.write, path=arguments.json))
    measure.write(report, arguments.json)
    print(table(report))
    return int(any("failed" in record for record in report["results"]))


if __name__ == "__main__":
    sys.exit(main())

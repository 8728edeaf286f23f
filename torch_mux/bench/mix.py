"""Several architectures at once: ``python -m torch_mux.bench.mix --json mix.json``.

Every contender answers one request of each tenant a round, at batch 1. Peers are Inductor's graphs, one after
another and as forked branches of one CUDA graph; ours are the programs' own plans one after another; the same
on branches, without parts of the device and with; in one captured graph beside each other under caps
(``beside``), and with matching launches made one (``packed``); and ``auto``, what a user gets: branches, and
one graph where that was measured to be faster. Answers are compared with float64 first, and repetitions take
turns.
"""

from __future__ import annotations

import argparse
import gc
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
from torch_mux import state
from torch_mux.bench import measure
from torch_mux.bench.contenders import CONTENDERS as PEERS
from torch_mux.bench.contenders import Contender, Mux
from torch_mux.bench.contenders.base import Arguments
from torch_mux.bench.mix_rows import ROWS, Pool, Row
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
        budget: seconds in all; repetitions are shed to keep it. None: no limit.
    """

    rows: tuple[str, ...]
    contenders: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    repetitions: int = 5
    rounds: int = 100
    budget: float | None = None


class MuxMix(Mux):
    """``torch_mux.gather`` under settings of its own."""

    def __init__(self, name: str, **settings: Any) -> None:
        super().__init__()
        self.name = name
        self.settings = settings

    def prepare(self, tenants: Tenants, counts: Sequence[int]) -> None:
        self.activate()
        super().prepare(tenants, counts)
        requests = tenants.requests[0][: max(counts)]
        self.goes_on(requests)
        for _ in range(
            _TURNS if self.settings["pack_after"] else 4
        ):  # both ways are measured, or it is built
            self.round(requests)
            state.engine().quiesce(self.patience)

    def goes_on(self, requests: Arguments) -> None:
        """Rounds until a mix has come again for long enough to be built."""
        until = time.monotonic() + 1.25 * self.settings["pack_after"]
        while time.monotonic() < until:
            self.round(requests)

    def notes(self) -> dict[str, Any]:
        return {**super().notes(), "mixes": [vars(mix) for mix in torch_mux.explain().mixes]}

    def activate(self) -> None:
        """Has the settings in force from the next round on; a mix that is not built yet is built first."""
        if {name: getattr(state.settings(), name) for name in self.settings} != self.settings:
            torch_mux.configure(**self.settings)

    def release(self) -> None:
        """The models stay: other contenders serve them too."""
        self.models = []


def _ours(name: str, **settings: Any) -> Callable[[], Contender]:
    """A contender under these settings, and all others that matter here as they are by default."""
    plain = {"pack": 1, "branches": None, "beside": None, "match": True, "pack_after": 0.0}
    return lambda: MuxMix(name, **{**plain, **settings})


CONTENDERS: dict[str, Callable[[], Contender]] = {
    **{key: PEERS[key] for key in ("inductor", "graphs", "forked")},
    "serial": _ours("torch-mux, own plans, one after another", branches=1),
    "branches": _ours("torch-mux, own plans on branches"),
    "parts": _ours("torch-mux, own plans on branches, parts by time", beside=1.0),
    "wide": _ours("torch-mux, own plans on branches, twice the parts", beside=2.0),
    "beside": _ours("torch-mux, own plans, capped, one graph", pack=12, match=False),
    "packed": _ours("torch-mux, packed", pack=12),
    "auto": _ours("torch-mux, branches or packed, by measurement", pack=12, pack_after=0.2),
}
#: Ours without launches for several programs.
OWN = ("serial", "branches", "parts", "wide", "beside")
_TURNS = 30


def run(options: Options, save: Callable[[dict[str, Any]], object] | None = None) -> dict[str, Any]:
    """Measures everything; plain data, one entry of ``results`` a row and contender.

    ``save`` gets the report after every contender and every repetition. A contender that fails has its error
    in its entry; the others go on.
    """
    started = time.monotonic()
    report: dict[str, Any] = {
        "environment": measure.environment(options.device),
        "options": {**vars(options), "device": str(options.device), "dtype": str(options.dtype)},
        "results": [],
    }
    rows = [ROWS[name] for name in options.rows]
    pool = Pool(rows, options.device, options.dtype)
    torch_mux.configure(max_bundle=max(count for row in rows for _, count in row.members))
    with torch.inference_mode():
        for number, row in enumerate(rows):
            share = None if options.budget is None else options.budget * (number + 1) / len(rows)
            deadline = None if share is None else started + share
            _row(row, options, pool, deadline, report["results"], lambda: save(report) if save else None)
            gc.collect()
    return report


def _row(
    row: Row,
    options: Options,
    pool: Pool,
    deadline: float | None,
    results: list[dict[str, Any]],
    save: Callable[[], object],
) -> None:
    contenders: dict[str, Contender] = {}
    records: dict[str, dict[str, Any]] = {}
    tenants = pool.tenants(row)
    exact = measure.references(tenants)
    for key in options.contenders:
        contender = CONTENDERS[key]()
        record = records[key] = {"row": row.name, "contender": contender.name, "tenants": row.tenants}
        results.append(record)
        begun = time.perf_counter()
        try:
            contender.prepare(tenants, [row.tenants])
            record["error"] = measure.errors(contender, tenants, exact, row.tenants)
            record["kernels"] = kernels(contender, tenants, row.tenants)
            record["notes"] = contender.notes()
            contenders[key] = contender
        except Exception as error:
            traceback.print_exc()
            record["failed"] = f"{type(error).__name__}: {error}"[:500]
        record["prepare_seconds"] = round(time.perf_counter() - begun, 1)
        save()
    _timed(contenders, records, tenants, options, deadline, save)
    for contender in contenders.values():
        contender.release()


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


def settle(contender: Contender, tenants: Tenants) -> None:
    """Has a contender of ours under its settings, and what they build built."""
    if isinstance(contender, MuxMix):
        contender.activate()
        contender.goes_on(tenants.requests[0])
        for _ in range(_TURNS if contender.settings["pack_after"] else 3):
            contender.round(tenants.requests[0])
            state.engine().quiesce(contender.patience)


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


HEADER = (
    *(
        "row",
        "tenants",
        "contender",
        "pipelined µs",
        "(min-max)",
        "synchronised µs",
        "predicted",
        "vs forked",
    ),
    *("vs own", "l2 error", "kernels", "joint", "overlap"),
)


def table(report: dict[str, Any]) -> str:
    """The results as plain text, with how many times faster than forked branches and than own plans."""
    facts = report["environment"]
    lines = [f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, commit {facts['commit']}"]
    rows = [HEADER, *(_cells(record, report["results"]) for record in report["results"])]
    lines += measure.aligned(rows)
    lines += [
        f"{record['row']}: {record['contender']} failed: {record['failed']}"
        for record in report["results"]
        if "failed" in record
    ]
    for record in report["results"]:
        mixes = record.get("notes", {}).get("mixes", ())
        lines += [f"{record['row']}: {mix['measured']}" for mix in mixes if mix["measured"]]
    return "\n".join(lines)


def _predicted(record: dict[str, Any]) -> str:
    """What the cost model says of the largest mix's plan, without the code between its launches."""
    mixes = [mix for mix in record.get("notes", {}).get("mixes", ()) if mix["words"] and mix["joint"]]
    largest = max(mixes, key=lambda mix: sum(slots for _, slots in mix["members"]), default=None)
    return "-" if largest is None else f"{largest['seconds'] * 1e6:.0f}"


def _cells(record: dict[str, Any], results: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    name = (record["row"], str(record["tenants"]), record["contender"])
    if "pipelined_us" not in record:
        return (*name, "failed" if "failed" in record else "-", *["-"] * (len(HEADER) - len(name) - 1))
    piped, waited = record["pipelined_us"], record["synchronised_us"]
    own = [CONTENDERS[key]().name for key in OWN]
    found = record["kernels"]
    counts = ["-"] * 3
    if found is not None:
        counts = [str(found["kernels"]), str(found["of several programs"]), f"{found['overlap']:.2f}"]
    return (
        *name,
        f"{piped['median']:.0f}",
        f"({piped['low']:.0f}-{piped['high']:.0f})",
        f"{waited['median']:.0f}",
        _predicted(record),
        _times(record, results, [CONTENDERS["forked"]().name]),
        _times(record, results, own),
        f"{record['error']['mean']:.2e}",
        *counts,
    )


def _times(record: dict[str, Any], results: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """How many times faster than the best of these in its row."""
    peers = [
        other["pipelined_us"]["median"]
        for other in results
        if other["row"] == record["row"] and other["contender"] in names and "pipelined_us" in other
    ]
    return f"{min(peers) / record['pipelined_us']['median']:.2f}" if peers else "-"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    cuda = torch.cuda.is_available()
    result = argparse.ArgumentParser(prog="torch-mux bench mix", description=__doc__)
    result.add_argument("--rows", default="four,encoders" if cuda else "tiny", help=f"of {', '.join(ROWS)}")
    peers = "serial,branches,beside,packed,forked" if cuda else "inductor,serial,branches,packed"
    result.add_argument("--contenders", default=peers, help=f"of {', '.join(CONTENDERS)}")
    result.add_argument("--device", default="cuda" if cuda else "cpu")
    result.add_argument("--dtype", default="float16" if cuda else "float32", choices=sorted(DTYPES))
    result.add_argument("--repetitions", type=int, default=5)
    result.add_argument("--rounds", type=int, default=100, help="rounds of one pipelined repetition")
    result.add_argument("--budget", type=float, default=None, help="seconds; repetitions are shed to keep it")
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
    return Options(
        rows,
        contenders,
        torch.device(arguments.device),
        DTYPES[arguments.dtype],
        arguments.repetitions,
        arguments.rounds,
        arguments.budget,
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

"""Many architectures, and what coalesces of each: ``python -m torch_mux.bench.zoo --json zoo.json``.

For small random-weight models of torchvision, timm, transformers and a few of our own, four instances each:
whether they run, how right the answers are beside eager's and Inductor's, the share of the work that
coalesces, launches, compile time, memory of a further instance, and every reason for a fall-back. Each entry
runs in a process of its own with empty compile caches; one that fails, crashes or takes too long is a row
with its error.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from torch_mux.bench import measure
from torch_mux.bench.workloads import DTYPES
from torch_mux.bench.zoo_models import ZOO
from torch_mux.bench.zoo_table import markdown, table

__all__ = ["Options", "main", "run"]

_POLL = 0.1
_PLACES = {name: place for place, name in enumerate(ZOO)}
_TAIL = 400


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        names: entries of ``ZOO``, or ``module:attribute`` of a :class:`torch_mux.bench.workloads.Workload`.
        device, dtype: where and in what precision the models run.
        jobs: entries at a time.
        threads: CPU threads of one entry; 0 for the cores divided by the jobs.
        limit: seconds that one entry may take.
        share_caches: entries share compile caches, for a quicker run whose compile times are not cold.
    """

    names: tuple[str, ...] = tuple(ZOO)
    device: str = "cpu"
    dtype: str = "float32"
    jobs: int = 1
    threads: int = 0
    limit: float = 240.0
    share_caches: bool = False


@dataclass
class _Job:
    """One entry under way: a process group with a folder of its own."""

    name: str
    process: subprocess.Popen[bytes]
    folder: tempfile.TemporaryDirectory[str]
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def kill(self) -> None:
        """Ends the entry and the compile workers that it started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return  # all of it has ended by itself
        finally:
            self.process.wait()

    def row(self, verdict: str | None) -> dict[str, Any]:
        """What it measured, with ``verdict`` among its errors."""
        folder = Path(self.folder.name)
        path = folder / "row.json"
        row: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"errors": {}}
        if verdict is not None:
            row["errors"]["process"] = verdict
        row |= {
            "model": self.name,
            "commit": measure.commit(),
            "kind": ZOO[self.name].kind if self.name in ZOO else "own",
            "seconds": round(self.seconds, 1),
            "load": round(os.getloadavg()[0], 1),  # others' too: compile times stretch with it
        }
        self.folder.cleanup()
        return row

    def last_words(self) -> str:
        """The end of what it printed."""
        lines = (Path(self.folder.name) / "log").read_text(errors="replace").strip().splitlines()
        return " | ".join(lines[-3:])[-_TAIL:]


def _start(name: str, options: Options, shared: str) -> _Job:
    folder = tempfile.TemporaryDirectory(prefix="torch-mux-zoo-", ignore_cleanup_errors=True)
    threads = options.threads or max(1, (os.cpu_count() or 1) // options.jobs)
    caches = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME", "TORCH_MUX_CACHE_DIR")
    place = shared if options.share_caches else folder.name
    environment = os.environ | {cache: f"{place}/{cache.lower()}" for cache in caches}
    environment |= {"TORCHINDUCTOR_COMPILE_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "torch_mux.bench.zoo_entry", name, "--out", f"{folder.name}/row.json"]
    command += ["--device", options.device, "--dtype", options.dtype, "--threads", str(threads)]
    with open(Path(folder.name) / "log", "wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    return _Job(name, process, folder)


def _verdict(job: _Job, limit: float) -> str | None:
    """Why an ended or overdue process failed, or None; a step's own error is in its row already."""
    code = job.process.returncode
    if code is None:
        return f"TimeoutError: not done after {limit:.0f} s"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}: {job.last_words()}"
    if code > 1 or not (Path(job.folder.name) / "row.json").exists():
        return f"exit code {code}: {job.last_words()}"
    return None


def run(options: Options, save: Callable[[dict[str, Any]], object] | None = None) -> dict[str, Any]:
    """Measures every entry; plain data, one item of ``results`` an entry, in the order of ``options.names``.

    ``save`` gets the report after each entry. Nothing that an entry does ends the run.
    """
    waiting, running = list(options.names), list[_Job]()
    rows: dict[str, dict[str, Any]] = {}
    environment = measure.environment(torch.device(options.device))
    shared = tempfile.TemporaryDirectory(prefix="torch-mux-zoo-", ignore_cleanup_errors=True)

    def report() -> dict[str, Any]:
        done = [rows[name] for name in options.names if name in rows]
        return {"environment": environment, "options": vars(options), "results": done}

    try:
        while waiting or running:
            while waiting and len(running) < options.jobs:
                running.append(_start(waiting.pop(0), options, shared.name))
            time.sleep(_POLL)
            for job in list(running):
                if job.process.poll() is None and job.seconds < options.limit:
                    continue
                verdict = _verdict(job, options.limit)
                job.kill()
                running.remove(job)
                rows[job.name] = job.row(verdict)
                if save is not None:
                    save(report())
    finally:
        for job in running:
            job.kill()
            job.folder.cleanup()
        shared.cleanup()
    return report()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    cuda = torch.cuda.is_available()
    result = argparse.ArgumentParser(prog="python -m torch_mux.bench.zoo", description=__doc__)
    result.add_argument("names", nargs="*", help=f"all unless given: {', '.join(ZOO)}; or module:attribute")
    result.add_argument("--device", default="cuda" if cuda else "cpu", help="cuda or cpu")
    result.add_argument("--dtype", default=None, choices=sorted(DTYPES), help="float16 on CUDA, else float32")
    result.add_argument("--jobs", type=int, default=1, help="entries at a time")
    result.add_argument("--threads", type=int, default=0, help="CPU threads an entry; 0: cores over jobs")
    result.add_argument("--limit", type=float, default=240.0, help="seconds that one entry may take")
    result.add_argument("--json", type=Path, default=None, help="write the record here after every entry")
    result.add_argument("--share-caches", action="store_true", help="quicker; compile times are not cold")
    result.add_argument("--keep", action="store_true", help="keep the rows of other entries in that record")
    result.add_argument("--markdown", type=Path, default=None, help="write the table as Markdown here")
    result.add_argument("--show", type=Path, default=None, help="run nothing, show this record")
    return result


def _progress(row: dict[str, Any], done: int, total: int) -> str:
    errors = "; ".join(f"{step}: {error}" for step, error in row["errors"].items())
    return f"[{done}/{total}] {row['model']}, {row['seconds']:.0f} s{': ' + errors if errors else ''}"


def _kept(flags: argparse.ArgumentParser, arguments: argparse.Namespace, options: Options) -> dict[str, Any]:
    """The record whose rows stay; an empty one without ``--keep``."""
    if not arguments.keep or arguments.json is None or not arguments.json.exists():
        return {"results": []}
    found = measure.read(flags, arguments.json)
    for name in ("device", "dtype"):
        if found["options"][name] != getattr(options, name):
            flags.error(f"{arguments.json} was measured with another {name}, {found['options'][name]}")
    return found


def merged(before: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """``report`` with the rows of ``before`` that it lacks, in the zoo's order; a row names its commit."""
    rows = {row["model"]: row for row in [*before["results"], *report["results"]]}
    order = sorted(rows, key=lambda name: _PLACES.get(name, len(_PLACES)))
    return {**report, "results": [rows[name] for name in order]}


@contextmanager
def _ending_entries() -> Iterator[None]:
    """A run that is asked to end ends its entries, too: they are process groups of their own."""
    former = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, writes the record, prints the table last; 1 where an entry failed, 2 for a wrong argument."""
    flags = parser()
    arguments = flags.parse_args(argv)
    unknown = [name for name in arguments.names if name not in ZOO and ":" not in name]
    if unknown:
        flags.error(f"unknown entry {', '.join(unknown)}; choose from {', '.join(ZOO)}")
    if arguments.jobs < 1 or arguments.limit <= 0:
        flags.error("--jobs and --limit must be positive")
    measure.require_device(flags, arguments.device)
    if arguments.show is not None:
        report = measure.read(flags, arguments.show)
    else:
        half = torch.device(arguments.device).type == "cuda"
        options = Options(
            names=tuple(arguments.names or ZOO),
            device=arguments.device,
            dtype=arguments.dtype or ("float16" if half else "float32"),
            jobs=arguments.jobs,
            threads=arguments.threads,
            limit=arguments.limit,
            share_caches=arguments.share_caches,
        )
        if not half:
            print("no GPU is used: measuring on the CPU", file=sys.stderr)
        measure.announce(torch.device(options.device))
        told: set[str] = set()
        before = _kept(flags, arguments, options)

        def save(report: dict[str, Any]) -> None:
            measure.write(merged(before, report), arguments.json)
            for row in report["results"]:
                if row["model"] not in told:
                    told.add(row["model"])
                    print(_progress(row, len(told), len(options.names)), file=sys.stderr, flush=True)

        with _ending_entries():
            report = merged(before, run(options, save))
    if arguments.markdown is not None:
        arguments.markdown.write_text(markdown(report))
    print(table(report))
    return int(any(row["errors"] for row in report["results"]))


if __name__ == "__main__":
    sys.exit(main())

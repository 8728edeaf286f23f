"""Programs compiled ahead in processes of their own, side by side: later ones find them in the caches.

A process compiles on one thread, and twelve lengths of a BERT are twelve programs: here each is compiled by
mux and by Inductor where there is a core for it, into the caches that every process reads.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, Final

import torch

from torch_mux.bench.workloads import DTYPES, batched, batched_name, build

__all__ = ["Wanted", "compile_ahead", "main"]

_POLL: Final = 0.05
_TAIL: Final = 400


@dataclass(frozen=True)
class Wanted:
    """A program that will be served.

    Attributes:
        name: of an architecture, as in the rows of ``torch_mux.bench.mix``.
        count: requests of its bundles.
        bundle: ``max_bundle`` of the process that will serve it.
        masked: with a mask of the attention.
        samples: of each request; of several, by mux alone.
    """

    name: str
    count: int
    bundle: int
    masked: bool = False
    samples: int = 1

    @property
    def label(self) -> str:
        """For people."""
        name = batched_name(self.name, self.samples)
        return f"{name} with a mask" if self.masked else name

    @property
    def flags(self) -> list[str]:
        """For :func:`main`."""
        sizes = [f"--count={self.count}", f"--bundle={self.bundle}", f"--samples={self.samples}"]
        return [self.name, *sizes, *["--masked"] * self.masked]


@dataclass(frozen=True)
class _Job:
    name: str
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    begun: float

    def end(self) -> None:
        """With all that it has started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()

    def outcome(self) -> str:
        """Seconds that it took, or the end of what it said."""
        if self.process.returncode == 0:
            return f"{time.monotonic() - self.begun:.1f} s"
        self.log.seek(0)
        return f"exit code {self.process.returncode}: {self.log.read().decode(errors='replace')[-_TAIL:]}"


def compile_ahead(
    wanted: Sequence[Wanted],
    jobs: int,
    limit: float,
    flags: Sequence[str],
    say: Callable[[str], object] = lambda words: None,
) -> dict[str, str]:
    """Has each program compiled, ``jobs`` at a time; what became of each, in words.

    Nothing depends on it: what is not compiled ahead, or not in time, is compiled when it is first asked for.

    Args:
        limit: seconds in all, after which processes that are left are ended.
        flags: of :func:`main`, for every program.
        say: is told of each that has ended.
    """
    waiting, running, found = list(wanted), list[_Job](), dict[str, str]()
    deadline = time.monotonic() + limit
    cores = max(1, (os.cpu_count() or 1) // max(1, min(jobs, len(wanted))))
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": str(cores)}
    try:
        while waiting or running:
            late = time.monotonic() > deadline
            while waiting and len(running) < jobs and not late:
                running.append(_start(waiting.pop(0), flags, environment))
            for job in [job for job in running if late or job.process.poll() is not None]:
                running.remove(job)
                over = job.process.poll() is None
                found[job.name] = f"ended after {limit:g} s" if over else job.outcome()
                job.end()
                say(f"{job.name} compiled ahead: {found[job.name]}")
            if late:
                found |= {one.label: f"not begun within {limit:g} s" for one in waiting}
                break
            time.sleep(_POLL)
    finally:
        for job in running:
            job.end()
    return found


def _start(wanted: Wanted, flags: Sequence[str], environment: Mapping[str, str]) -> _Job:
    command = [sys.executable, "-m", "torch_mux.bench.ahead", *wanted.flags, *flags]
    log = tempfile.TemporaryFile()  # noqa: SIM115, the job closes it
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )
    return _Job(wanted.label, process, log, time.monotonic())


def _compile(given: argparse.Namespace) -> None:
    """One architecture, in this process."""
    import torch_mux
    from torch_mux import state
    from torch_mux.bench.contenders import inductor_callables
    from torch_mux.bench.mix_contenders import mask_of
    from torch_mux.bench.mix_rows import workload_of

    device, dtype = torch.device(given.device), DTYPES[given.dtype]
    tenants = build(workload_of(given.name), 1, device, dtype, variants=1)
    if given.samples > 1:
        tenants = batched(tenants, given.samples)
    request: tuple[Any, ...] = tenants.requests[0][0]
    if given.masked:
        length = request[0].shape[-1]
        request = (*request, mask_of(length, length, dtype, device))
    torch_mux.configure(max_bundle=given.bundle)
    with torch.inference_mode():
        if given.mux:
            model = torch.compile(tenants.models[0], backend="mux")
            torch_mux.warmup(model, *request, sizes=(1, given.count))
            if not state.engine().quiesce(given.patience, ahead=True):
                raise TimeoutError(f"still compiling after {given.patience:g} s")
        if given.inductor and not given.masked and given.samples == 1:
            inductor_callables(tenants)
    torch_mux.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles one architecture for later processes."""
    flags = argparse.ArgumentParser(prog="python -m torch_mux.bench.ahead", description=__doc__)
    flags.add_argument("name", help="of an architecture, as in the rows of torch_mux.bench.mix")
    flags.add_argument("--count", type=int, default=1, help="requests of a bundle")
    flags.add_argument("--bundle", type=int, default=16, help="max_bundle of the process that will serve")
    flags.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flags.add_argument("--dtype", default="float16" if torch.cuda.is_available() else "float32")
    flags.add_argument("--mux", action="store_true", help="by mux")
    flags.add_argument("--inductor", action="store_true", help="by Inductor")
    flags.add_argument("--samples", type=int, default=1, help="of each request")
    flags.add_argument("--masked", action="store_true", help="with a mask of the attention")
    flags.add_argument("--patience", type=float, default=180.0, help="seconds to wait for what compiles")
    _compile(flags.parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())

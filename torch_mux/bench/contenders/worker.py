"""What runs in a process of its own for one tenant."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from torch_mux.bench.contenders.base import Contender, synchronize
from torch_mux.bench.contenders.graphs import GraphEach
from torch_mux.bench.contenders.inductor import OneByOne
from torch_mux.bench.workloads import WORKLOADS, Tenants, build

__all__ = ["Failed", "Job", "Times", "serve"]

#: When requests began and ended, in seconds of the machine's monotonic clock.
Times = list[tuple[float, float]]
_HEAD_START: Final = 2e-3  # a barrier lets the processes go one after another within about so much


@dataclass(frozen=True)
class Job:
    """One tenant: enough to make its model again elsewhere."""

    workload: str
    number: int
    device: str
    dtype: torch.dtype
    channels_last: bool
    variants: int

    @classmethod
    def of(cls, tenants: Tenants, number: int) -> Job:
        """Of the tenant with that number."""
        dtype = next(tenants.models[0].parameters()).dtype
        return cls(
            tenants.workload.name,
            number,
            str(tenants.device),
            dtype,
            tenants.channels_last,
            len(tenants.requests),
        )

    def build(self) -> Tenants:
        """That tenant alone."""
        workload, device = WORKLOADS[self.workload], torch.device(self.device)
        return build(workload, 1, device, self.dtype, self.variants, self.channels_last, first=self.number)


@dataclass(frozen=True)
class Failed:
    """What went wrong, in words: exceptions of libraries do not all travel."""

    words: str


def serve(job: Job, link: Any, barriers: Mapping[int, Any], start: Any) -> None:
    """Prepares, says so, and does what it is told until it is told to stop.

    Args:
        link: a connection to the parent.
        barriers: by the number of processes that take part.
        start: a number that all share: when the next round begins.
    """
    try:
        with torch.inference_mode():
            server = _Server(job)
            link.send("ready")
            while (told := link.recv())[0] != "stop":
                link.send(server.do(told[0], told[1], barriers, start))
    except EOFError:  # the parent is gone
        return
    except Exception as error:
        link.send(Failed(f"{type(error).__name__}: {str(error).strip()[:400]}"))


class _Server:
    def __init__(self, job: Job) -> None:
        if "OMP_NUM_THREADS" in os.environ:
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        with torch.inference_mode(False), torch.no_grad():
            self.tenants = job.build()
        self.inner: Contender = GraphEach() if self.tenants.device.type == "cuda" else OneByOne()
        self.inner.prepare(self.tenants, (1,))
        self.request(0)

    def request(self, index: int) -> tuple[float, float]:
        """One request and its answer, waited for; when it began and ended."""
        row = self.tenants.requests[index % len(self.tenants.requests)]
        begin = time.perf_counter()
        self.inner.round(row)
        synchronize(row)
        return begin, time.perf_counter()

    def do(self, what: str, given: Any, barriers: Mapping[int, Any], start: Any) -> Any:
        """An answer to pickled arguments, pickled on the CPU, or the times of so many requests."""
        if what == "answer":
            arguments = tuple(x.to(self.tenants.device) for x in pickle.loads(given))
            answer: Tensor = self.inner.round([arguments])[0]
            return pickle.dumps(answer.cpu())
        count, rounds = given
        if what == "pipelined":
            _together(barriers[count], start)
            return [self.request(index) for index in range(rounds)]
        times = []
        for index in range(rounds):
            _together(barriers[count], start)
            times.append(self.request(index))
        return times


def _together(barrier: Any, start: Any) -> None:
    """Returns in all processes at one moment, by the clock that they share."""
    if barrier.wait() == 0:
        start.value = time.perf_counter() + _HEAD_START
    barrier.wait()
    moment = start.value
    while time.perf_counter() < moment:
        pass

"""A process a tenant, each in a loop that waits for every answer: time-sliced, or under MPS."""

from __future__ import annotations

import os
import pickle
import statistics
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from multiprocessing import get_context
from typing import Any, Final, Protocol
from unittest import mock

from torch_mux.bench.contenders import mps
from torch_mux.bench.contenders.base import Arguments, NotApplicable, SelfTimed
from torch_mux.bench.contenders.worker import Failed, Job, Times, serve
from torch_mux.bench.workloads import WORKLOADS, Tenants

__all__ = ["MPSProcesses", "Processes"]

_READY: Final = 300.0  # seconds for importing torch, making a model and compiling it, many at a time
_ANSWER: Final = 120.0
#: They are as many as there are processors or more, and the parent has compiled the same.
_ENVIRONMENT: Final = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}


class Service(Protocol):
    """What the processes of a contender are clients of."""

    environment: dict[str, str]

    def verify(self) -> None:
        """Raises where they are not."""
        ...


class Processes(SelfTimed):
    """Every tenant in a process of its own, with its own CUDA graph; the device is shared in time.

    Rounds that are synchronised begin at one moment in all processes and end with the last of them; in
    pipelined ones each process goes on with its next request as soon as it has its answer.
    """

    name = "a process a tenant, time-sliced"

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._links: list[Any] = []
        self.processes: list[Any] = []
        self._latencies: dict[str, object] = {}

    def service(self) -> AbstractContextManager[Service | None]:
        """What they run under: nothing."""
        return nullcontext()

    def prepare(self, tenants: Tenants, counts: Sequence[int]) -> None:
        if WORKLOADS.get(tenants.workload.name) is not tenants.workload:
            raise NotApplicable(f"{tenants.workload.name} is no workload that another process knows by name")
        service = self._stack.enter_context(self.service())
        environment = dict(_ENVIRONMENT) if service is None else {**_ENVIRONMENT, **service.environment}
        most = max(counts)
        context = get_context("spawn")
        start = context.Value("d", 0.0)
        barriers = {count: context.Barrier(count, timeout=_ANSWER) for count in counts}
        with mock.patch.dict(os.environ, environment):
            for number in range(most):
                here, there = context.Pipe()
                shared = {count: barrier for count, barrier in barriers.items() if number < count}
                job = Job.of(tenants, number)
                process = context.Process(target=serve, args=(job, there, shared, start), daemon=True)
                process.start()
                there.close()
                self._links.append(here)
                self.processes.append(process)
                self._stack.enter_context(_ending(process, here))
        for link in self._links:
            _receive(link, _READY)
        if service is not None:
            service.verify()

    def round(self, requests: Arguments) -> Sequence[Any]:
        """Inputs go to the processes and answers come back by value, through the CPU."""
        given = [pickle.dumps(tuple(x.cpu() for x in args)) for args in requests]
        answers = self._ask(len(requests), "answer", given)
        device = requests[0][0].device
        return [pickle.loads(answer).to(device) for answer in answers]

    def pipelined(self, count: int, rounds: int) -> float:
        """From the first start to the last end, by the clock that all processes of a machine share."""
        found = self._times("pipelined", count, rounds)
        self._note(count, found)
        first = min(each[0][0] for each in found)
        last = max(each[-1][1] for each in found)
        return (last - first) / rounds

    def synchronised(self, count: int, rounds: int) -> float:
        """From the first start to the last end of each round."""
        found = self._times("synchronised", count, rounds)
        spans: list[float] = [
            max(end for _, end in each) - min(start for start, _ in each) for each in zip(*found, strict=True)
        ]
        return statistics.median(spans)

    def notes(self) -> dict[str, object]:
        return self._latencies

    def release(self) -> None:
        self._links = []
        self._stack.close()

    def _times(self, how: str, count: int, rounds: int) -> list[Times]:
        found: list[Times] = self._ask(count, how, [(count, rounds)] * count)
        return found

    def _ask(self, count: int, what: str, arguments: Sequence[object]) -> list[Any]:
        links = self._links[:count]
        for link, given in zip(links, arguments, strict=True):
            link.send((what, given))
        return [_receive(link, _ANSWER) for link in links]

    def _note(self, count: int, found: list[Times]) -> None:
        """Latencies of single requests while all processes run at their own pace."""
        spent = sorted(1e6 * (end - start) for each in found for start, end in each)
        place = min(len(spent) - 1, int(0.99 * len(spent)))
        self._latencies[f"latency at {count}, µs"] = {
            "median": statistics.median(spent),
            "p99": spent[place],
        }


class MPSProcesses(Processes):
    """The same under NVIDIA's multi-process service, which has kernels of several processes run at once."""

    name = "a process a tenant, under MPS"

    def service(self) -> AbstractContextManager[Service | None]:
        return mps.service()

    def prepare(self, tenants: Tenants, counts: Sequence[int]) -> None:
        if tenants.device.type != "cuda":
            raise NotApplicable("MPS needs a GPU")
        super().prepare(tenants, counts)


def _receive(link: Any, patience: float) -> Any:
    """The next message of a process.

    Raises:
        RuntimeError: what failed there, or that it ended.
        TimeoutError: it said nothing for so long.
    """
    if not link.poll(patience):
        raise TimeoutError(f"a process said nothing for {patience:.0f} s")
    try:
        message = link.recv()
    except EOFError:
        raise RuntimeError("a process of this peer ended") from None
    if isinstance(message, Failed):
        raise RuntimeError(f"in its process: {message.words}")
    return message


@contextmanager
def _ending(process: Any, link: Any) -> Iterator[None]:
    """On the way out the process is asked to stop, and made to."""
    try:
        yield
    finally:
        try:
            link.send(("stop", None))
        except OSError:  # it has ended
            link.close()
        process.join(5.0)
        for force in (process.terminate, process.kill):
            if process.is_alive():
                force()
                process.join(5.0)
        link.close()

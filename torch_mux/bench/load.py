"""The load generator: one thread that injects requests, open loop and closed loop at the same time.

Open-loop requests are injected at arrival times computed before the run, all that are due in one batch; their
latency counts from the scheduled time, so a generator that lags does not flatter (coordinated omission: Tene,
"How NOT to Measure Latency", 2015). Closed-loop clients have so many requests under way all the time.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from torch_mux.bench.arrivals import arrivals
from torch_mux.bench.outcome import Got, Outcome, Window, finite, quantile
from torch_mux.bench.threads import thread_seconds

__all__ = [
    "Client",
    "Finished",
    "Got",
    "Outcome",
    "Server",
    "Shot",
    "Traffic",
    "Window",
    "drive",
    "finite",
    "quantile",
    "search",
]

_PATIENCE = 5.0
#: Seconds between two looks at a server that has to be asked, and at one that tells by itself.
_POLL, _LOOK = 50e-6, 1e-3
#: Requests that are sent without a pause, and the pause: a generator that is late and never blocks would keep
#: the interpreter's lock, and be what it measures. After a pause it may wait for that lock for Python's 5 ms,
#: so that smaller batches would bound the rate.
_BATCH, _PAUSE = 64, 20e-6
#: Called once a request has its answer: (its number, the moment, what went wrong or None).
Finished = Callable[[int, float, BaseException | None], None]


@dataclass(frozen=True, eq=False)
class Client:
    """Who sends requests.

    Attributes:
        workload: name of the architecture that it asks.
        index: which of the models of that architecture.
        inputs: arguments that it sends in turn.
        quota: fields of ``torch_mux.quota``, ``tenant`` among them.
    """

    workload: str
    index: int
    inputs: Sequence[tuple[Tensor, ...]]
    quota: Mapping[str, Any]


class Shot(NamedTuple):
    """One request to submit."""

    number: int
    client: Client
    inputs: tuple[Tensor, ...]


class Server(Protocol):
    """Answers requests that one thread submits.

    Attributes:
        name: on the command line and in the record.
        polled: whether nothing is reported unless :meth:`poll` is called.
    """

    name: str
    polled: bool

    def submit(self, batch: Sequence[Shot], finished: Finished) -> None:
        """Starts on these requests without waiting for them."""
        ...

    def poll(self) -> None:
        """Reports what has finished, where nobody else does."""
        ...

    def release(self) -> None:
        """Gives back what was prepared."""
        ...


@dataclass(frozen=True)
class Traffic:
    """What one client sends.

    Attributes:
        rate: requests a second that arrive whatever becomes of them.
        depth: requests that are under way all the time, instead.
        start: seconds after the beginning at which a closed-loop client joins.
    """

    client: Client
    rate: float = 0.0
    depth: int = 0
    start: float = 0.0


class _Drive:
    """One run, from the generator's thread; answers may be told from any.

    What it keeps of a request are numbers, which Python's collector does not look through: it would stop the
    server too.
    """

    def __init__(
        self, server: Server, traffics: Sequence[Traffic], window: Window, process: str, seed: int
    ) -> None:
        self.server, self.traffics, self.window = server, traffics, window
        self.end = window.lead + window.seconds
        variants = min(len(traffic.client.inputs) for traffic in traffics)
        rates = [traffic.rate for traffic in traffics]
        planned = arrivals(process, rates, self.end, variants, seed)
        self.planned = [one.time for one in planned]
        self.askers = [one.tenant for one in planned]
        self.variants = [one.variant for one in planned]
        closed = [index for index, traffic in enumerate(traffics) if traffic.depth]
        self.joins = sorted(closed, key=lambda index: -traffics[index].start)
        # By number: whose traffic a request is and when it was due; when it ended, and what it failed with.
        self.owners: list[int] = []
        self.scheduled: list[float] = []
        self.ends: dict[int, float] = {}
        self.failures: dict[int, str] = {}
        self.done: list[int] = []  # in the order of their ends
        self.lags: list[float] = []
        self.holds: list[float] = []
        self.position = self.seen = 0
        # When the last call into the server returned, and the thread's CPU time in such calls and asleep.
        self.begin = self.returned = self.submitting = self.asleep = 0.0
        self.eager, self.napping, self.wake = bool(closed), False, threading.Event()

    def finished(self, number: int, now: float, error: BaseException | None) -> None:
        # Each of these is atomic: no lock that the runtime's threads would meet the generator at.
        self.ends[number] = now
        if error is not None:
            self.failures[number] = type(error).__name__
        self.done.append(number)
        if self.napping:
            self.wake.set()

    def _shot(self, index: int, scheduled: float, variant: int) -> Shot:
        client, number = self.traffics[index].client, len(self.owners)
        self.owners.append(index)
        self.scheduled.append(scheduled)
        return Shot(number, client, client.inputs[variant % len(client.inputs)])

    def due(self, now: float) -> list[Shot]:
        """What is to be sent now, at most so many that others become due only a little later."""
        batch: list[Shot] = []
        while self.joins and self.traffics[self.joins[-1]].start <= now:
            index = self.joins.pop()
            batch += [self._shot(index, now, variant) for variant in range(self.traffics[index].depth)]
        while now < self.end and self.seen < len(self.done) and len(batch) < _BATCH:
            number = self.done[self.seen]
            self.seen += 1
            index = self.owners[number]
            if self.traffics[index].depth and number not in self.failures:
                batch.append(self._shot(index, now, number))
        while self.position < len(self.planned) and len(batch) < _BATCH:
            moment, place = self.planned[self.position], self.position
            if moment > now:
                break
            self.position += 1
            if moment >= self.window.lead:
                self.holds.append(max(0.0, self.returned - moment))
                self.lags.append(now - max(moment, self.returned))
            batch.append(self._shot(self.askers[place], moment, self.variants[place]))
        return batch

    def serve(self, batch: Sequence[Shot]) -> None:
        """Has the server take these requests, and report what has ended where it has to be asked."""
        if batch or self.server.polled:
            before = time.thread_time()
            if batch:
                self.server.submit(batch, self.finished)
            self.server.poll()
            self.submitting += time.thread_time() - before
            self.returned = time.perf_counter() - self.begin

    def nap(self) -> None:
        """:meth:`doze`, with what it costs counted."""
        before = time.thread_time()
        self.doze()
        self.asleep += time.thread_time() - before

    def doze(self) -> None:
        """Until the next request is due or, in closed loop, an answer is there."""
        now = time.perf_counter() - self.begin
        gap = _POLL if self.server.polled else _LOOK
        if now < self.end:
            gap = min(gap, self.end - now)
        if self.position < len(self.planned):
            gap = min(gap, self.planned[self.position] - now)
        gap = max(_PAUSE, gap)
        if not self.eager or now >= self.end:
            time.sleep(gap)
            return
        self.wake.clear()
        self.napping = True
        if self.seen == len(self.done):
            self.wake.wait(gap)
        else:
            time.sleep(_PAUSE)
        self.napping = False

    def run(self, probe: Callable[[], Any]) -> list[Any]:
        """Sends until the window has ended and all that was due in it is sent, then waits for the answers.

        Returns:
            What the probe said.
        """
        probes: list[Any] = []
        marks = [self.window.lead, self.end]
        self.begin = time.perf_counter() + 0.01
        while marks or self.position < len(self.planned):
            now = time.perf_counter() - self.begin
            while marks and now >= marks[0]:
                probes.append(probe())
                del marks[0]
            self.serve(self.due(now))
            self.nap()
        last = time.perf_counter() + _PATIENCE
        while len(self.done) < len(self.owners) and time.perf_counter() < last:
            self.serve(())
            self.nap()
        probes.append(probe())
        return probes

    def got(self) -> tuple[Got, ...]:
        lead = self.window.lead
        offered, served = [0] * len(self.traffics), [0] * len(self.traffics)
        latencies: list[list[float]] = [[] for _ in self.traffics]
        errors: list[Counter[str]] = [Counter() for _ in self.traffics]
        for number, (index, scheduled) in enumerate(zip(self.owners, self.scheduled, strict=True)):
            moment, error = self.ends.get(number, math.inf) - self.begin, self.failures.get(number)
            served[index] += error is None and lead <= moment < self.end
            if scheduled < lead:
                continue
            offered[index] += 1
            if error is not None:
                errors[index][error] += 1
            else:
                latencies[index].append(moment - scheduled)
        rows = zip(offered, served, latencies, errors, strict=True)
        return tuple(Got(a, b, tuple(sorted(c)), dict(d)) for a, b, c, d in rows)


def drive(
    server: Server,
    traffics: Sequence[Traffic],
    window: Window,
    *,
    process: str = "poisson",
    seed: int = 0,
    probe: Callable[[], Any] = lambda: None,
) -> Outcome:
    """Sends this traffic to a server and waits for the answers.

    Args:
        process: of the open-loop arrivals, see ``torch_mux.bench.arrivals``.
        probe: called at both ends of the window, and when everything has ended.
    """
    one = _Drive(server, traffics, window, process, seed)
    before, whole, own = thread_seconds(), time.process_time(), time.thread_time()
    with torch.inference_mode():
        probes = one.run(probe)
    own = time.thread_time() - own - one.submitting
    whole = time.process_time() - whole - own
    count = max(1, len(one.owners))
    parts: dict[str, float] = defaultdict(float, submit=one.submitting / count)
    for thread, spent in thread_seconds().items():
        parts[thread[0]] += (spent - before.get(thread, 0.0)) / count
    return Outcome(
        window,
        one.got(),
        len(one.owners),
        _tail(one.lags),
        own / count,
        whole / count,
        probes=tuple(probes),
        held=_tail(one.holds),
        asleep=one.asleep / count,
        parts={name: spent for name, spent in parts.items() if spent},
    )


def _tail(values: Sequence[float]) -> float:
    return quantile(sorted(values), 0.99) if values else 0.0


def search(
    run: Callable[[float], Outcome], most: float, bound: float, steps: int
) -> tuple[float, list[Outcome]]:
    """The highest rate tried whose p99 is within ``bound`` and that all were answered at; bisection.

    Args:
        run: one open-loop run at a rate.
        most: a rate that cannot be exceeded.
        bound: seconds.

    Returns:
        (that rate, 0 if none was; every run).
    """
    low, high, runs = 0.0, most, []
    for _ in range(steps):
        rate = (low + high) / 2
        found = run(rate)
        runs.append(found)
        if found.p99 <= bound and not found.errors and not found.missing:
            low = rate
        else:
            high = rate
    return low, runs

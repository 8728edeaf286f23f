"""Host time of the policy a request: ``python -m torch_mux.bench.decisions --json decisions.json``.

Needs no device: tenants always have requests pending, bundles end after a virtual millisecond, and only the
calls of the policy are timed. The fastest of several runs counts, since other work on the machine only adds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from torch_mux.bench import measure
from torch_mux.runtime.scheduler.base import Issue, LaneLoad, View
from torch_mux.runtime.scheduler.pending import Flow, Pending
from torch_mux.runtime.scheduler.policy import FairPolicy
from torch_mux.settings import Settings
from torch_mux.types import Quota

__all__ = ["CASES", "Case", "main", "microseconds", "run", "table"]

_REPEATS = 5


@dataclass(frozen=True)
class Case:
    """Tenants spread over programs, each with so many requests pending, in bundles of up to so many."""

    tenants: int
    programs: int
    pending: int
    bundle: int


CASES: Final = (
    Case(64, 1, 1, 64),
    Case(64, 1, 16, 64),
    Case(64, 1, 16, 16),
    Case(64, 4, 1, 64),
    Case(64, 64, 16, 64),
    Case(64, 64, 16, 4),
    Case(64, 64, 1, 1),
    Case(1000, 1, 16, 64),
    Case(1000, 1000, 1, 1),
)


@dataclass(eq=False)
class _Ticket:
    arrival: float
    client: int
    quota: Quota
    seq: int
    key: str
    due: float = float("inf")


class _Queue:
    """The pending requests of one program."""

    ready, slots, ordered, reserved = True, 1 << 20, False, False

    def __init__(self, key: str) -> None:
        self.key = key
        self.requests: Pending[_Ticket] = Pending()

    @property
    def timed(self) -> bool:
        return self.requests.timed

    @property
    def due(self) -> float:
        return self.requests.due

    def flows(self) -> Mapping[Flow, Collection[_Ticket]]:
        return self.requests.flows()

    def fresh(self) -> Sequence[Flow]:
        return self.requests.fresh()


class _Load:
    """A policy under a load that never ends; ``spent`` seconds in it so far."""

    def __init__(self, case: Case) -> None:
        self.settings = Settings(max_bundle=case.bundle)
        self.policy = FairPolicy()
        self.spent, self.now, self.requests = 0.0, 0.0, 0
        self._queues = [_Queue(f"p{number}") for number in range(case.programs)]
        self._active: dict[_Queue, None] = {}
        self._fresh: dict[_Queue, None] = {}
        self._flying: deque[Issue] = deque()
        self._quotas = [Quota(f"t{number}") for number in range(case.tenants)]
        self._seq = 0
        for client in list(range(case.tenants)) * case.pending:
            self._submit(client)

    def _submit(self, client: int) -> None:
        queue = self._queues[client % len(self._queues)]
        queue.requests.append(_Ticket(self.now, client, self._quotas[client], self._seq, queue.key))
        self._seq += 1
        if queue.requests.stirred:
            queue.requests.stirred = False
            self._active[queue] = self._fresh[queue] = None

    def step(self) -> None:
        """One decision; where nothing more can go out, a bundle ends and its clients ask again."""
        view = View(self._active.keys(), (LaneLoad(len(self._flying)),), None, self._fresh.keys())
        started = time.perf_counter()
        decision = self.policy.form(view, self.now, self.settings) if self._active else None
        self.spent += time.perf_counter() - started
        self._fresh.clear()
        if isinstance(decision, Issue):
            self._issue(decision)
        else:
            self._end()

    def _issue(self, issue: Issue) -> None:
        taken = [request for request in issue.requests if isinstance(request, _Ticket)]
        queue = self._queues[int(issue.key[1:])]
        queue.requests.take(taken)
        if not queue.requests:
            del self._active[queue]
        started = time.perf_counter()
        self.policy.issued(issue, self.now)
        self.spent += time.perf_counter() - started
        self._flying.append(issue)
        self.requests += len(taken)

    def _end(self) -> None:
        issue = self._flying.popleft()
        self.now += 1e-3
        started = time.perf_counter()
        self.policy.completed(issue, self.now, 1e-3)
        self.spent += time.perf_counter() - started
        for request in issue.requests:
            self._submit(request.client)


def microseconds(case: Case, requests: int) -> float:
    """Of the policy, a request, over at least so many requests; the first tenth warms up."""
    load = _Load(case)
    while load.requests < requests // 10:
        load.step()
    load.spent, load.requests = 0.0, 0
    while load.requests < requests:
        load.step()
    return load.spent / load.requests * 1e6


def run(requests: int, cases: Sequence[Case] = CASES) -> dict[str, Any]:
    """The fastest of several runs of every case."""
    results = [
        asdict(case) | {"us a request": min(microseconds(case, requests) for _ in range(_REPEATS))}
        for case in cases
    ]
    return {"environment": measure.environment(torch.device("cpu")), "requests": requests, "results": results}


def table(report: dict[str, Any]) -> str:
    """One line a case."""
    rows = [("tenants", "programs", "pending each", "bundle of", "us a request")]
    for found in report["results"]:
        tenants, programs, pending, bundle = (
            str(found[name]) for name in ("tenants", "programs", "pending", "bundle")
        )
        rows.append((tenants, programs, pending, bundle, f"{found['us a request']:.2f}"))
    return "\n".join(measure.aligned(rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, writes the record and prints the table."""
    flags = argparse.ArgumentParser(prog="python -m torch_mux.bench.decisions", description=__doc__)
    flags.add_argument("--requests", type=int, default=20_000, help="of one run")
    flags.add_argument("--json", type=Path, default=None, help="write the record here")
    arguments = flags.parse_args(argv)
    if arguments.requests < 10:
        flags.error("--requests must be at least 10")
    report = run(arguments.requests)
    measure.write(report, arguments.json)
    print(table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What serving costs the host: the policy's decision, and all of a request from submission to completion."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from torch_mux.bench.figures.base import Finding, Row, lateness
from torch_mux.bench.figures.stage import Stage
from torch_mux.bench.load import Outcome, Traffic
from torch_mux.runtime.scheduler.base import Issue, LaneLoad, View, lane_kinds
from torch_mux.runtime.scheduler.isolation import IsolatingPolicy
from torch_mux.runtime.scheduler.pending import Flow, Pending
from torch_mux.runtime.scheduler.predictor import Predictor
from torch_mux.settings import Settings
from torch_mux.types import Quota

__all__ = ["decision_seconds", "measure", "wake_seconds"]

_TENANTS: Final = 64
_BACKLOG: Final = 16
_LOAD: Final = 0.5
#: Requests that each tenant has under way where the device is saturated.
_DEPTH: Final = 2
_SLOT: Final = 1e-4
#: Seconds of a sleep, as long as those between two looks at the device.
_NAP: Final = 50e-6


@dataclass(eq=False)
class _Ticket:
    """A request, as a policy sees it."""

    arrival: float
    seq: int
    quota: Quota
    client: int = 0
    due: float = float("inf")


class _Queue:
    """The queue of one program, as a policy sees it."""

    key, ready, slots, ordered, timed, reserved = "program", True, 1 << 20, False, False, False
    due = float("inf")

    def __init__(self) -> None:
        self.requests: Pending[_Ticket] = Pending()

    def flows(self) -> Mapping[Flow, Collection[_Ticket]]:
        return self.requests.flows()

    def fresh(self) -> Sequence[Flow]:
        return self.requests.fresh()


def decision_seconds(tenants: int, backlog: int, rounds: int = 300) -> float:
    """CPU seconds a request of deciding who goes out, charging it and learning from it, one bundle a round.

    Args:
        backlog: requests that each tenant has pending; what goes out is replaced.
    """
    policy, queue = IsolatingPolicy(Predictor()), _Queue()
    settings = Settings(max_bundle=64, linger=0.0)
    lanes = [LaneLoad(kind=kind) for kind in lane_kinds(settings)]
    quotas = [Quota(f"tenant-{number}") for number in range(tenants)]
    for number in range(tenants * backlog):
        queue.requests.append(_Ticket(0.0, number, quotas[number % tenants]))
    spent, served, seq, now = 0.0, 0, tenants * backlog, 0.0
    for turn in range(2 * rounds):
        fresh = [queue] if queue.requests.stirred else []
        queue.requests.stirred = False
        before = time.thread_time()
        decision = policy.form(View([queue], lanes, None, fresh), now, settings)
        spent += time.thread_time() - before
        assert isinstance(decision, Issue)
        gone = [request for request in decision.requests if isinstance(request, _Ticket)]
        queue.requests.take(gone)
        now += _SLOT * len(gone)
        before = time.thread_time()
        policy.issued(decision, now)
        policy.completed(decision, now, _SLOT * len(gone))
        spent += time.thread_time() - before
        served += len(gone)
        if turn == rounds - 1:  # the first half warms up
            spent, served = 0.0, 0
        for request in gone:
            seq += 1
            queue.requests.append(_Ticket(now, seq, request.quota))
    return spent / served


def wake_seconds(times: int = 200) -> float:
    """CPU seconds that this host takes to put a thread to sleep and wake it up again."""
    before = time.thread_time()
    for _ in range(times):
        time.sleep(_NAP)
    return (time.thread_time() - before) / times


def _parts(kind: str, run: Outcome) -> list[Row]:
    """What of the CPU time of a request is whose: who submits, the thread that dispatches, all others."""
    submit, dispatch = (run.parts.get(name, 0.0) for name in ("submit", "torch_mux-dispatch"))
    parts = {"in the call that submits": submit, "of the thread that dispatches": dispatch}
    if len(run.parts) > 1:  # else the system does not tell
        parts["of other threads"] = max(0.0, run.host - submit - dispatch)
    return [Row(f"{kind}: {name}", 1e6 * seconds, None, unit="us") for name, seconds in parts.items()]


def measure(stage: Stage) -> Finding:
    """The policy alone, an open loop of 64 tenants at half of the load, and closed loops of all of them."""
    light, heavy = (decision_seconds(_TENANTS, backlog) for backlog in (1, _BACKLOG))
    clients = stage.clients(stage.main, _TENANTS, "host")
    rate = _LOAD * stage.most()
    run = stage.drive([Traffic(one, rate=rate / len(clients)) for one in clients])
    full = stage.drive([Traffic(one, depth=_DEPTH) for one in clients])
    rows = (
        Row("policy decision a request, 64 tenants", 1e6 * light, 3.0, unit="us"),
        Row(f"the same with {_BACKLOG} pending each", 1e6 * heavy, 3.0, unit="us"),
        Row("host CPU a request, submit to completion", 1e6 * run.host, 25.0, unit="us"),
        Row("the same, saturated", 1e6 * full.host, 25.0, unit="us"),
        *_parts("half load", run),
        *_parts("saturated", full),
        Row("the generator's own cost a request", 1e6 * run.cost, None, unit="us"),
        Row("the same without falling asleep and waking", 1e6 * (run.cost - run.asleep), None, unit="us"),
        Row("CPU time of one sleep on this host", 1e6 * wake_seconds(), None, unit="us"),
    )
    failed = run.errors + full.errors
    errors = (f"requests failed: {dict(failed)}",) if failed else ()
    data = {"tenants": _TENANTS, "backlog": _BACKLOG, "rate": rate, "run": run.data(), "full": full.data()}
    return Finding(rows, data, errors, lateness((run,)))

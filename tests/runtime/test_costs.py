"""What is done once a request does not grow with the number of programs, requests or models."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from simulated import Device, Queue

from torch_mux.runtime import holdings
from torch_mux.runtime.line import Line
from torch_mux.runtime.request import Waiter
from torch_mux.runtime.scheduler.base import Issue, LaneLoad, View
from torch_mux.runtime.scheduler.pending import Pending
from torch_mux.runtime.scheduler.policy import FairPolicy
from torch_mux.settings import Settings
from torch_mux.types import Quota


class Counted(Queue):
    """Counts how often anything is asked of any queue."""

    asked = 0

    def __getattribute__(self, name: str) -> Any:
        Counted.asked += 1
        return super().__getattribute__(name)


def asked_a_request(programs: int, requests: int, most: int) -> float:
    """Questions to queues a request that goes out, with a tenant a program, by the policy alone."""
    policy = FairPolicy()
    device = Device(policy, Settings(max_bundle=most), lambda key, slots: 1e-3 * slots)
    for number in range(programs):
        device.queues[f"p{number}"] = Counted(f"p{number}")
        for _ in range(requests):
            device.submit(f"p{number}", Quota(f"t{number}"), number)
    queues: Any = dict(device.queues).values()
    fresh: Any = list(queues)
    asked = out = 0
    while out < programs * requests // 2:
        view = View(queues, [LaneLoad(bundles) for bundles in device._lanes], None, fresh)
        Counted.asked = 0
        decision = policy.form(view, device.now, device.settings)
        asked += Counted.asked
        assert isinstance(decision, Issue)
        device._issue(decision)
        out += len(decision.requests)
        if sum(device._lanes) == 2:
            next(device.advance(1e9))
        fresh = [queue for queue in queues if queue.requests.stirred]
        for queue in fresh:
            queue.requests.stirred = False
    return asked / out


def test_a_decision_does_not_look_at_every_program() -> None:
    few, many = asked_a_request(8, 4, 1), asked_a_request(512, 4, 1)
    assert many < 1.5 * few + 10


def test_a_larger_bundle_costs_less_a_request() -> None:
    assert asked_a_request(64, 16, 16) < asked_a_request(64, 16, 1) / 4


def test_whom_to_wake_is_known_without_looking_at_the_backlog(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, program = lab.engine(), lab.program()
    engine.register(program)
    assert engine.quiesce(10)
    model = lab.Affine()
    requests = [lab.submit(engine, program, model) for _ in range(300)]
    line: Line = requests[0].dispatcher._line
    with monkeypatch.context() as patched:
        patched.setattr(Pending, "__iter__", lambda self: pytest.fail("the backlog was looked at"))
        assert line.waiter() is None and not line.orphaned()
        first = line.line_up(None, requests[200:201])
        assert line.waiter() is first
        second = line.line_up(None, requests[100:300])
        assert line.waiter() is first
        requests[200].waiters = (second,)
        line.awaited(requests[200])
        assert line.waiter() is second
        line.take_bundle(requests[100:300])
        assert line.waiter() is None
        line.kick()
        assert line.orphaned()
        line.take_bundle(requests[:100])
        assert not line.orphaned()
    for request in requests:
        request.waiters = ()
    line.put_back(requests)
    assert isinstance(line.waiter(), Waiter) is False and line.orphaned()
    engine.wait(requests)


def test_a_models_first_request_does_not_count_all_other_models(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, program = lab.engine(), lab.program()
    engine.register(program)
    assert engine.quiesce(10)
    looked = Counter[str]()
    real = holdings._storage
    monkeypatch.setattr(holdings, "_storage", lambda tensor: (looked.update(["once"]), real(tensor))[1])
    models = [lab.Affine() for _ in range(60)]
    for number, model in enumerate(models):
        for tenant in (f"t{number}", "everybody"):
            lab.submit(engine, program, model, quota=Quota(tenant, memory=1 << 20)).result()
    assert looked["once"] <= 2 * 2 * len(models) + 10
    ledger = engine._memory
    kept = {f"t{number}": ledger.held(f"t{number}") for number in range(60)} | {
        "everybody": ledger.held("everybody")
    }
    ledger.changed()
    assert kept == {name: pytest.approx(ledger.held(name), abs=1) for name in kept}

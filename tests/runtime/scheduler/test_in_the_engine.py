"""The policy behind the real dispatcher: order, and nothing kept of bundles that failed or were refused."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from slow_device import slow

from torch_mux.errors import DispatchFailed, ExecutionFailed, MemoryQuotaExceeded
from torch_mux.runtime.scheduler.policy import FairPolicy
from torch_mux.types import Quota


def ended(requests: list[Any]) -> list[str]:
    """Names in the order in which they will end."""
    order: list[str] = []
    for request in requests:
        request.add_done_callback(lambda done: order.append(done.quota.tenant))
    return order


def test_a_latecomer_shares_the_next_bundle_and_does_not_wait_for_the_whole_backlog(lab: Any) -> None:
    engine, program, model = lab.engine(max_bundle=2), lab.program(), lab.Affine()
    greedy = [lab.submit(engine, program, model, quota=Quota("greedy")) for _ in range(6)]
    late = [lab.submit(engine, program, model, quota=Quota("late")) for _ in range(2)]
    order = ended([*greedy, *late])
    engine.wait([*greedy, *late])
    assert sorted(order[:4]) == ["greedy", "greedy", "late", "late"]
    assert order[4:] == ["greedy"] * 4
    assert lab.plans["affine"].bundles == [2] * 4


def test_a_heavier_tenant_gets_more_of_the_bundles(lab: Any) -> None:
    engine, program, model = lab.engine(max_bundle=4), lab.program(), lab.Affine()
    requests = [
        lab.submit(engine, program, model, quota=Quota(name, weight=weight))
        for name, weight in (("one", 1.0), ("three", 3.0))
        for _ in range(40)
    ]
    order = ended(requests)
    engine.wait(requests)
    assert order[:48].count("three") == pytest.approx(36, abs=3)


def test_a_failing_bundle_leaves_nothing_in_the_policy(lab: Any) -> None:
    engine, program, models = lab.engine(max_bundle=2), lab.program(), [lab.Affine(), lab.Affine()]
    lab.call(engine, program, models[0])

    def fail(inputs: list[torch.Tensor]) -> None:
        if (inputs[0] == 7.0).any():
            raise ValueError("seven")

    lab.plans["affine"].before = fail
    requests = [
        lab.submit(engine, program, models[number % 2], float(number), Quota(f"t{number % 3}"))
        for number in range(9)
    ]
    engine.wait(requests)
    with pytest.raises(ExecutionFailed, match="seven"):
        requests[7].result()
    assert [request.state.value for request in requests] == ["done"] * 7 + ["error"] + ["done"]
    assert requests[0].dispatcher.policy.common._flying == {}


def test_what_is_left_of_a_refused_bundle_is_charged_and_measured(lab: Any) -> None:
    engine, program = lab.engine(), lab.program("slow")
    lab.slow["slow"] = gate = threading.Event()
    models = [lab.Affine(), lab.Affine()]
    requests = [
        lab.submit(engine, program, model, quota=Quota(name, memory=memory))
        for model, (name, memory) in zip(models, (("rich", None), ("poor", 70)))
    ]
    gate.set()
    engine.wait(requests)
    with pytest.raises(MemoryQuotaExceeded):
        requests[1].result()
    policy = requests[0].dispatcher.policy.common
    assert policy._flying == {}
    assert list(policy.predictor._programs["print-slow"].contexts[16, 0]) == [1]


def test_weights_hold_between_programs_on_a_device_that_runs_behind_the_host(lab: Any) -> None:
    engine, device = slow(lab, max_bundle=2)
    device.seconds = 0.002
    other = lab.program("other")
    engine.register(other)
    assert engine.quiesce(10)
    model, order = lab.Affine(), []
    for program, name, weight in ((lab.program(), "one", 1.0), (other, "three", 3.0)):
        for _ in range(80):
            request = lab.submit(engine, program, model, quota=Quota(name, weight=weight))
            request.add_done_callback(lambda done: order.append(done.quota.tenant))
    engine.kick()
    lab.until(lambda: len(order) == 160, 20.0)
    assert order[:80].count("three") == pytest.approx(60, abs=6)
    assert engine.stats().tenants["one"].device_seconds == pytest.approx(0.08)


class Faulty(FairPolicy):
    """Raises once when it is told what was issued."""

    fault = True

    def issued(self, issue: Any, now: float) -> None:
        fault, self.fault = self.fault, False
        if fault:
            raise SystemError("bug")
        super().issued(issue, now)


def test_a_policy_that_raises_fails_its_bundle_and_nobody_hangs(lab: Any) -> None:
    engine, program, model = lab.engine(), lab.program(), lab.Affine(2.0)
    lab.call(engine, program, model)
    request = lab.submit(engine, program, model)
    request.dispatcher._driver.policy = request.dispatcher._runner._policy = Faulty()
    engine.kick()
    lab.until(request.done)
    with pytest.raises(DispatchFailed, match="bug"):
        request.result()
    assert lab.call(engine, program, model, 3.0)[0].item() == 6.0

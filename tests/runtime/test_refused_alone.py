"""Of requests submitted together, those that cannot be in time are refused, and the others queued."""

from __future__ import annotations

from typing import Any

import pytest
from clocks import Told

from torch_mux.errors import DeadlineUnattainable
from torch_mux.runtime import dispatch
from torch_mux.types import Quota


def measured(lab: Any, **settings: Any) -> tuple[Any, Any, Any]:
    """An engine that knows that a bundle takes 20 ms, a model, and what the engine has of it."""
    clock = Told()
    engine, program, model = lab.engine(clock, **settings), lab.program(), lab.Affine(2.0)
    engine.register(program)
    assert engine.quiesce(10)

    def take(inputs: Any) -> None:
        clock.now += 0.02

    lab.plans["affine"].before = take
    for _ in range(5):
        lab.submit(engine, program, model).result()
    return engine, model, engine.instance(program, model.tensors())


def test_of_a_round_those_that_cannot_be_in_time_are_refused_alone_where_that_is_asked_for(lab: Any) -> None:
    engine, _model, instance = measured(lab)  # which must not be collected
    late = Quota("hasty", deadline=0.01)
    quotas = [Quota("a"), late, Quota("b", deadline=9.0), late]
    calls = [(instance, [lab.x(float(number))], quota) for number, quota in enumerate(quotas)]
    with pytest.raises(DeadlineUnattainable):
        engine.submit_all(calls)
    refused: dict[int, DeadlineUnattainable] = {}
    requests = engine.submit_all(calls, refused=refused)
    assert sorted(refused) == [1, 3]
    assert [request.result()[0][0].item() for request in requests] == [0.0, 4.0]
    found = engine.stats().tenants
    assert (found["hasty"].accepted, found["hasty"].refused) == (0, 2)
    assert (found["b"].accepted, found["b"].ok) == (1, 1)


@pytest.mark.parametrize("more", [0, 4])
def test_who_is_refused_leaves_the_host_to_who_sends_out(
    lab: Any, monkeypatch: pytest.MonkeyPatch, more: int
) -> None:
    """He asks faster than the host serves. Small bundles sent out by himself would make it slower still: he
    helps only where more is pending than bundles take.
    """
    engine, _model, instance = measured(lab, max_bundle=2)
    (dispatcher,) = engine._dispatchers.values()
    slept: list[float] = []
    monkeypatch.setattr(dispatcher.service, "poke", lambda: None)
    monkeypatch.setattr(dispatch.time, "sleep", slept.append)
    quota = Quota("a", deadline=9.0)
    admitted = [engine.submit(instance, [lab.x()], quota) for _ in range(1 + more)]
    with pytest.raises(DeadlineUnattainable):
        engine.submit(instance, [lab.x()], Quota("hasty", deadline=0.01), kick=True)
    assert [request.out for request in admitted] == [more > 0] * len(admitted)
    assert slept == ([] if more else [dispatch._PAUSE])
    assert [request.result()[0][0].item() for request in admitted] == [2.0] * len(admitted)

"""What two threads may do at the same moment: each request ends once, and nobody else's is touched."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from torch_mux.errors import ClosedError, DispatchFailed, MuxError
from torch_mux.runtime.scheduler.bucket import TokenBucket
from torch_mux.types import Quota


@pytest.mark.parametrize("taken", ["failed", "compiled"])
def test_what_was_taken_out_to_fail_cannot_be_cancelled(lab: Any, taken: str) -> None:
    """Between the two steps of a failure another thread cancels; a bystander's request is in the queue."""
    engine, program = lab.engine(), lab.program()
    engine.register(program)
    engine.quiesce(10)
    model = lab.Affine(2.0)
    dispatcher = engine._dispatchers[torch.device("cpu")]
    request = lab.submit(engine, program, model)
    cancelled: list[bool] = []
    bystanders: list[Any] = []
    name = "fail" if taken == "failed" else "end"
    real = getattr(dispatcher._runner, name)

    def between(requests: Any, *arguments: Any) -> None:
        setattr(dispatcher._runner, name, real)
        if taken == "failed":
            bystanders.append(lab.submit(engine, program, model, quota=Quota("bystander")))
        cancelled.append(request.cancel())
        real(requests, *arguments)

    setattr(dispatcher._runner, name, between)
    if taken == "failed":
        dispatcher.fail_all(RuntimeError("the service thread failed"))
    else:
        served = request.served
        served.error = RuntimeError("no plan after all")
        dispatcher.compiled(served)
        served.error = None
        bystanders.append(lab.submit(engine, program, model, quota=Quota("bystander")))
    assert cancelled == [False]
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(bystanders[0].result()), daemon=True)
    thread.start()
    thread.join(10)
    assert len(answers) == 1
    with pytest.raises(MuxError, match=r"service thread failed|no plan after all"):
        request.result()
    for got in engine.stats().tenants.values():
        assert got.pending == 0 and got.accepted == got.ok + got.errors


def test_a_clock_that_was_read_early_credits_nothing_twice() -> None:
    bucket = TokenBucket()
    taken = 0
    for step in range(1, 101):
        late, early = step / 100, step / 100 - 0.009
        for now in (late, early, late, early):
            if bucket.wait(now, 10.0, 1) == 0.0:
                bucket.take(now, 10.0, 1)
                taken += 1
    assert taken <= 11


def test_calls_that_race_with_a_reset_are_answered_or_told(lab: Any) -> None:
    """Whatever was registered between the steps of a reset is served: nothing hangs, counts add up."""
    engine = lab.engine()
    programs, models = [lab.program(f"p{number}") for number in range(4)], [lab.Affine(2.0) for _ in range(4)]
    done, wrong = threading.Event(), []

    def client(number: int) -> None:
        while not done.is_set():
            try:
                answer = lab.call(engine, programs[number], models[number], 3.0)
                if answer[0].item() != 6.0:
                    wrong.append(answer)
            except MuxError as error:
                if not isinstance(error, (ClosedError, DispatchFailed)):
                    wrong.append(error)

    threads = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(25):
        engine.reset()
    done.set()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "a call hangs"
    assert not wrong
    for got in engine.stats().tenants.values():
        assert got.pending == 0 and got.accepted == got.ok + got.errors


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_program_registered_while_a_reset_stops_the_old_ones_is_compiled(lab: Any, moment: str) -> None:
    engine, program, model = lab.engine(), lab.program(), lab.Affine(2.0)
    lab.call(engine, program, model)
    (old,) = engine._dispatchers.values()
    late: list[Any] = []
    real = old.close

    def close(timeout: float) -> None:
        if moment == "before":
            late.append(lab.submit(engine, program, model, 3.0))
        real(timeout)
        if moment == "after":
            late.append(lab.submit(engine, program, model, 3.0))

    old.close = close
    engine.reset()
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(late[0].result()[0][0].item()), daemon=True)
    thread.start()
    thread.join(10)
    assert answers == [6.0]
    got = engine.stats().tenants["default"]
    assert (got.accepted, got.ok, got.pending) == (1, 1, 0)

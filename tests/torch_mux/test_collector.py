"""The garbage collector rests while somebody traces and until a quiet moment after, and only then."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from clocks import Told
from torch import nn

import torch_mux
from torch_mux import backend
from torch_mux.compat import collector
from torch_mux.compat.collector import SERVING, Rest

BEFORE = (701, 11, 9)


@pytest.fixture(autouse=True)
def thresholds() -> Iterator[None]:
    deadline = time.monotonic() + 10
    while resting() and time.monotonic() < deadline:  # since a trace of another test
        time.sleep(0.05)
    found = gc.get_threshold()
    gc.set_threshold(*BEFORE)
    yield
    gc.set_threshold(*found)


def resting() -> bool:
    return gc.get_threshold()[0] == 0


def goes_on(within: float = 10.0) -> bool:
    deadline = time.monotonic() + within
    while resting() and time.monotonic() < deadline:
        time.sleep(0.01)
    return gc.get_threshold() == BEFORE


def test_it_goes_on_after_the_last_of_several_threads() -> None:
    rest = Rest(quiet=0.05)
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with rest.paused():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with rest.paused():
        thread.start()
        assert inside.wait(10) and resting()
    time.sleep(0.2)
    assert resting()
    leave.set()
    thread.join(10)
    assert goes_on()


def test_it_rests_through_a_pause_between_two_traces() -> None:
    clock = Told()
    rest = Rest(quiet=0.05, clock=clock)
    for _ in range(4):
        with rest.paused():
            clock.now += 0.01
        clock.now += 0.02
        time.sleep(0.06)
        assert resting()
    clock.now += 0.04
    assert goes_on()


def test_traces_one_after_another_do_not_put_it_off_for_ever() -> None:
    clock = Told()
    rest = Rest(quiet=60.0, longest=0.2, clock=clock)
    with rest.paused():
        pass
    assert resting()
    clock.now += 0.3
    with rest.paused():
        pass
    assert gc.get_threshold() == BEFORE


def test_what_a_user_sets_meanwhile_stays() -> None:
    rest = Rest(quiet=0.05)
    with rest.paused():
        gc.set_threshold(5000, 20, 20)
        assert gc.isenabled()
        gc.disable()
    time.sleep(0.3)
    try:
        assert gc.get_threshold() == (5000, 20, 20) and not gc.isenabled()
    finally:
        gc.enable()
    gc.set_threshold(0)
    with rest.paused():
        pass
    time.sleep(0.3)
    assert resting()


def test_an_error_inside_ends_it() -> None:
    rest = Rest(quiet=0.05)
    with pytest.raises(ValueError, match="trace"), rest.paused():
        raise ValueError("trace")
    assert goes_on()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_it_goes_on_in_a_forked_child() -> None:
    rest = Rest(quiet=0.05)
    os.register_at_fork(after_in_child=rest.after_fork)
    with rest.paused():
        child = os.fork()
        if not child:
            os._exit(0 if gc.get_threshold() == BEFORE else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert goes_on()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_collects_as_its_user_said() -> None:
    rest = Rest(quiet=0.05)
    os.register_at_fork(after_in_child=rest.after_fork)
    rest.serve(True)
    assert gc.get_threshold() == SERVING
    child = os.fork()
    if not child:
        os._exit(0 if gc.get_threshold() == BEFORE and not rest.given() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert rest.given()
    rest.serve(False)
    assert gc.get_threshold() == BEFORE


def test_who_serves_goes_on_serving_after_a_trace() -> None:
    rest = Rest(quiet=0.05)
    rest.serve(True)
    with rest.paused():
        assert resting() and not rest.given()
    deadline = time.monotonic() + 10
    while resting() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert gc.get_threshold() == SERVING and rest.given()
    rest.serve(False)
    assert gc.get_threshold() == BEFORE


def test_it_rests_from_a_first_trace_to_the_first_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    capture = backend._capture

    def watching(*args: Any) -> Any:
        seen.append(resting())
        return capture(*args)

    clock = Told()
    monkeypatch.setattr(collector.rest, "_clock", clock)
    monkeypatch.setattr(backend, "_capture", watching)
    model: Any = torch.compile(nn.Linear(4, 4).eval(), backend="mux", dynamic=False)
    with torch.no_grad():
        torch_mux.gather((model, torch.randn(1, 4)))
    assert seen == [True] and resting()
    clock.now += 1.1
    assert goes_on()

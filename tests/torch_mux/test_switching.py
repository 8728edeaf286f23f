"""Threads take turns quickly while somebody is inside, and as before when the last one has left."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

import pytest

from torch_mux import compat
from torch_mux.compat import switching

BEFORE = 0.004


@pytest.fixture(autouse=True)
def interval() -> Iterator[None]:
    found = sys.getswitchinterval()
    sys.setswitchinterval(BEFORE)
    yield
    sys.setswitchinterval(found)


def now() -> float:
    return round(sys.getswitchinterval(), 6)


def test_until_the_last_of_several_threads_has_left() -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with compat.quick_switching():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with contextlib.suppress(ValueError), compat.quick_switching():
        thread.start()
        assert inside.wait(10) and now() == 0.001
        raise ValueError
    assert now() == 0.001
    leave.set()
    thread.join(10)
    assert now() == BEFORE


def test_what_a_user_sets_stays() -> None:
    with compat.quick_switching():
        sys.setswitchinterval(0.02)
    assert now() == 0.02
    sys.setswitchinterval(0.0001)
    with compat.quick_switching():
        assert now() == 0.0001
    assert now() == 0.0001


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_as_before() -> None:
    with switching.quick_switching():
        child = os.fork()
        if not child:
            os._exit(0 if now() == BEFORE else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert now() == BEFORE

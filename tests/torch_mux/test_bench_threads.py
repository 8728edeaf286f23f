"""CPU time by thread, for the load generator's record."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from torch_mux.bench import threads
from torch_mux.bench.threads import thread_seconds


def test_who_works_is_seen_under_his_name_and_who_has_ended_is_not() -> None:
    stop = threading.Event()

    def working() -> None:
        while not stop.is_set():
            pass

    one = threading.Thread(target=working, name="busy-7")
    one.start()
    number = one.native_id
    assert number is not None
    until = time.monotonic() + 20.0
    while thread_seconds().get(("busy", number), 0.0) < 0.02 and time.monotonic() < until:
        time.sleep(0.01)
    assert 0.02 <= thread_seconds()["busy", number] < 20.0
    stop.set()
    one.join()
    until = time.monotonic() + 20.0
    while ("busy", number) in thread_seconds():  # the system ends it a little later than Python
        assert time.monotonic() < until
    assert threading.get_native_id() not in {number for _, number in thread_seconds()}, "not the caller"


def test_a_system_without_such_counters_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / str(threading.get_native_id())).mkdir()
    monkeypatch.setattr(threads, "_TASKS", tmp_path)
    assert thread_seconds() == {}
    monkeypatch.setattr(threads, "_TASKS", tmp_path / "nowhere")
    assert thread_seconds() == {}

"""The garbage collector is held off while somebody traces, and only then."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from torch import nn

from torch_mux import backend, compat


def test_it_is_on_again_after_the_last_of_several_threads() -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with compat.paused_collector():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with compat.paused_collector():
        thread.start()
        assert inside.wait(10) and not gc.isenabled()
    assert not gc.isenabled()
    leave.set()
    thread.join(10)
    assert gc.isenabled()


def test_what_a_user_turned_off_stays_off_and_errors_turn_it_on() -> None:
    gc.disable()
    try:
        with compat.paused_collector():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
    with pytest.raises(ValueError, match="trace"), compat.paused_collector():
        raise ValueError("trace")
    assert gc.isenabled()


def test_first_calls_pause_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    capture = backend._capture

    def watching(*args: Any) -> Any:
        seen.append(gc.isenabled())
        return capture(*args)

    monkeypatch.setattr(backend, "_capture", watching)
    model: Any = torch.compile(nn.Linear(4, 4).eval(), backend="mux", dynamic=False)
    with torch.no_grad():
        model(torch.randn(1, 4))
    assert seen == [False] and gc.isenabled()

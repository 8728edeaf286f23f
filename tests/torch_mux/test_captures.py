"""Device-wide synchronisation waits for captures in progress."""

from __future__ import annotations

import threading

import pytest
import torch

from torch_mux import compat


def test_synchronize_waits_for_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    for module in (torch.cuda, torch.accelerator):
        monkeypatch.setattr(module, "synchronize", lambda *args: calls.append(args))
    compat.guard_synchronize()
    wrapped = torch.cuda.synchronize
    compat.guard_synchronize()
    assert torch.cuda.synchronize is wrapped
    other = threading.Thread(target=torch.cuda.synchronize, args=("cuda:0",))
    with compat.capturing():
        other.start()
        other.join(0.05)
        assert other.is_alive() and not calls
        torch.cuda.synchronize()  # the capturing thread itself is not held up
        torch.accelerator.synchronize()
        assert calls == [(), ()]
    other.join(5)
    assert calls[-1] == ("cuda:0",)

"""``health()``: what is wrong is said, by device, model and tenant."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import torch_mux
from torch_mux import compat, state


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).relu()


def _serve() -> None:
    model = torch.compile(Net().eval(), backend="mux")
    with torch.inference_mode():
        torch_mux.gather((model, torch.ones(1, 8)))


def test_before_and_after_the_first_request_all_is_well() -> None:
    torch_mux.reset()
    assert torch_mux.health().status == "ok" and torch_mux.health().devices == ()
    _serve()
    found = torch_mux.health()
    (device,) = found.devices
    assert found.status == "ok" and found.reasons == found.compiling == ()
    assert (device.device, device.fault, device.pending, device.oldest) == ("cpu", None, 0, 0.0)
    assert str(found).splitlines()[0] == "ok"


def test_a_closed_runtime_has_failed_until_it_is_reset() -> None:
    _serve()
    torch_mux.close()
    found = torch_mux.health()
    assert found.status == "failed" and "torch_mux.reset()" in str(found)
    torch_mux.reset()
    assert torch_mux.health().status == "ok"


def test_a_fault_of_the_device_is_named() -> None:
    _serve()
    (dispatcher,) = state.engine()._dispatchers.values()
    dispatcher.executor.fault = RuntimeError("CUDA error: an illegal access\nmore")
    found = torch_mux.health()
    assert found.status == "failed"
    said = "cpu has failed, start a new process: RuntimeError: CUDA error: an illegal access"
    assert found.reasons == (said,)
    with pytest.raises(torch_mux.DeviceFailed, match="cpu serves nothing more in this process") as caught:
        _serve()
    assert isinstance(caught.value.__cause__, RuntimeError)
    got = torch_mux.stats().tenants["default"]
    assert got.accepted == got.ok and got.pending == 0


def test_a_model_without_a_plan_is_degraded(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_mux.lowering import plan

    def broken(*_: object) -> object:
        raise RuntimeError("no plan today")

    _serve()
    monkeypatch.setattr(plan, "compile_plan", broken)
    monkeypatch.setattr(state.engine()._compiler, "compile_plan", None)

    class Other(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).tanh()

    other = torch.compile(Other().eval(), backend="mux")
    with torch.inference_mode(), pytest.raises(torch_mux.MuxError):
        torch_mux.gather((other, torch.ones(1, 8)))
    found = torch_mux.health()
    assert found.status == "degraded" and "no plan today" in found.failed["Other"]
    assert "Other has no plan" in str(found)


FAULT = """
import os, sys, time
import torch, torch_mux
from torch import nn

class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x, index):
        return self.layer(x)[index]

model = torch.compile(Broken().eval().cuda(), backend="mux")
x = torch.ones(4, 8, device="cuda")
with torch.inference_mode():
    torch_mux.gather((model, x, torch.tensor([1], device="cuda")))
    assert torch_mux.health().status == "ok"
    good, bad = torch.tensor([1], device="cuda"), torch.tensor([1 << 20], device="cuda")
    torch_mux.gather((model, x, bad))
    for _ in range(500):
        torch_mux.stats()
        if torch_mux.health().status != "ok":
            break
        time.sleep(0.02)
    print(torch_mux.health())
    try:
        torch_mux.gather((model, x, good))
    except torch_mux.DeviceFailed as error:
        print("refused", error)
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.gpu
def test_an_illegal_access_is_a_fault_that_stays() -> None:
    """A device-side assertion poisons the CUDA context of its process."""
    done = subprocess.run(
        [sys.executable, "-c", FAULT], capture_output=True, text=True, timeout=120, check=False
    )
    assert "cuda:0 has failed, start a new process" in done.stdout, done.stdout + done.stderr
    assert "failed" in done.stdout.splitlines()
    assert "refused cuda:0 serves nothing more" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("the model says CUDA error"), False),
        (ValueError("CUDA error"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
    ],
)
def test_what_cuda_reported_is_told_from_what_models_raise(error: BaseException, wanted: bool) -> None:
    assert compat.is_device_error(error) == wanted

"""Entries of a zoo that misbehave, each in a way of its own."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from torch_mux.bench.workloads import Workload
from torch_mux.bench.zoo_models import answer


class Raising(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("cannot | run")


def _features(generator: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randn(1, 4, generator=generator),)


def _unbuildable() -> nn.Module:
    raise RuntimeError("no such architecture")


def _crashing() -> nn.Module:
    print("about to crash", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
    return nn.Identity()


def _hanging() -> nn.Module:
    Path(os.environ["ZOO_SUBJECTS_PID"]).write_text(str(os.getpid()))
    time.sleep(600)
    return nn.Identity()


raising = Workload("raising", Raising, _features, answer)
unbuildable = Workload("unbuildable", _unbuildable, _features, answer)
crashing = Workload("crashing", _crashing, _features, answer)
hanging = Workload("hanging", _hanging, _features, answer)

"""What a measure beside the times of rounds gets, and what several of them do."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import torch_mux
from torch_mux import compat
from torch_mux.bench import measure
from torch_mux.bench.contenders import Arguments, Mux
from torch_mux.bench.workloads import Tenants, more

__all__ = ["Newcomer", "Stage", "newcomers"]


@dataclass(frozen=True)
class Stage:
    """A prepared contender of ours and its tenants.

    Attributes:
        counts: numbers of tenants that rounds were prepared for.
        rounds: how many rounds make one measurement.
    """

    mux: Mux
    tenants: Tenants
    counts: tuple[int, ...]
    rounds: int

    def requests(self, size: int) -> Arguments:
        """So many requests, of the tenants in turn; where that is more than there are, they ask again."""
        row = self.tenants.requests[0]
        return [row[index % len(row)] for index in range(size)]

    def ask(self, size: int) -> None:
        """One bundle of so many requests, waited for."""
        models, requests = self.mux.models, self.requests(size)
        torch_mux.gather(*[(models[i % len(models)], *args) for i, args in enumerate(requests)])
        self.wait()

    def wait(self) -> None:
        """For the device."""
        if self.tenants.device.type == "cuda":
            torch.cuda.synchronize()

    @property
    def captured(self) -> frozenset[int]:
        """Bundle sizes captured for this model."""
        programs = torch_mux.explain().programs
        return frozenset(size for program in programs for lane in program.captured for size in lane)


@dataclass(frozen=True)
class Newcomer:
    """A further tenant of an architecture that is known.

    Attributes:
        bind, first, second: seconds for ``torch.compile``, the first and the second answer.
        error: relative l2 error of the first answer against float64.
        traces, programs: graphs that Dynamo made and programs that came up for it.
        memory: device bytes that it left allocated and reserved, beyond its weights.
    """

    bind: float
    first: float
    second: float
    error: float
    traces: int
    programs: int
    memory: dict[str, int]


def newcomers(stage: Stage, count: int, adopted: bool = False) -> Iterator[Newcomer]:
    """Further tenants one after another, each bound, prepared and asked twice; all are kept until the end.

    Args:
        adopted: their weights are brought into the kernels' layout first.
    """
    with torch.inference_mode(False), torch.no_grad():
        extra = more(stage.tenants, count)
        exact = measure.references(extra)[0]
    kept = []
    try:
        for index, model in enumerate(stage.mux.served(extra)):
            if adopted:
                torch_mux.adopt(model)
            found = _Arrival(stage, model, extra, index)
            kept.append(found.compiled)
            answer = found.answer
            got = answer if isinstance(answer, torch.Tensor) else extra.workload.tensor(answer)
            error = float((got.double() - exact[index]).norm() / exact[index].norm())
            yield found.newcomer(error)
    finally:
        for compiled in kept:
            torch_mux.remove(compiled)


class _Arrival:
    """One of them: what it is asked, and what that took."""

    def __init__(self, stage: Stage, model: nn.Module, extra: Tenants, index: int) -> None:
        arguments = extra.requests[0][index]
        device, before = extra.device, self._made()
        stage.wait()
        memory, marks = measure.Memory.now(device), [time.perf_counter()]
        self.compiled: Any = torch.compile(model, backend="mux")
        marks.append(time.perf_counter())
        self.answer: Any = None
        for again in (False, True):
            (answer,) = torch_mux.gather((self.compiled, *arguments))
            stage.wait()
            marks.append(time.perf_counter())
            self.answer = self.answer if again else answer
        del answer
        after = measure.Memory.now(device)
        self._memory = {
            "allocated": after.allocated - memory.allocated,
            "reserved": after.reserved - memory.reserved,
        }
        now = self._made()
        self._marks, self._new = marks, (now[0] - before[0], now[1] - before[1])

    @staticmethod
    def _made() -> tuple[int, int]:
        return compat.compile_counter("stats", "unique_graphs"), len(torch_mux.explain().programs)

    def newcomer(self, error: float) -> Newcomer:
        """As plain data."""
        bind, first, second = (b - a for a, b in itertools.pairwise(self._marks))
        return Newcomer(bind, first, second, error, self._new[0], self._new[1], self._memory)

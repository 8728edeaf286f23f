"""What a contender is: one way to serve a round, one request of each tenant."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from torch_mux.bench.workloads import Tenants

__all__ = ["Arguments", "Contender", "NotApplicable", "Peer", "SelfTimed", "synchronize"]

#: One request's arguments of each tenant.
Arguments = Sequence[tuple[Tensor, ...]]


class NotApplicable(RuntimeError):
    """A peer that cannot run here, or that has nothing to do for this model; the message says why."""


class Contender(Protocol):
    """One way to serve a round: one request of each of the first n tenants.

    Attributes:
        name: in the record and its tables.
        shared_weights: all requests are answered with the first tenant's weights; for reference only.
    """

    name: str
    shared_weights: bool

    def prepare(self, tenants: Tenants, counts: Sequence[int]) -> None:
        """Compile and capture for rounds of the given numbers of tenants."""
        ...

    def round(self, requests: Arguments) -> Sequence[Any]:
        """Enqueue one round, one request a tenant; what it returns belongs to the caller."""
        ...

    def notes(self) -> dict[str, object]:
        """What is worth recording besides times."""
        ...

    def release(self) -> None:
        """Give back graphs and buffers; also after a preparation that failed."""
        ...


class Peer:
    """What most contenders have in common."""

    shared_weights = False

    def notes(self) -> dict[str, object]:
        """Nothing."""
        return {}

    def release(self) -> None:
        """There is nothing to give back."""


class SelfTimed(Peer, ABC):
    """A contender whose rounds are timed where they run, and never while others are prepared.

    Its ``round`` gives the right answers, at no particular speed.
    """

    @abstractmethod
    def pipelined(self, count: int, rounds: int) -> float:
        """Seconds a round where no tenant waits for another between its rounds."""

    @abstractmethod
    def synchronised(self, count: int, rounds: int) -> float:
        """Median seconds of a round that all tenants begin together."""


def synchronize(requests: Arguments) -> None:
    """Wait for the device of the requests."""
    if requests[0][0].is_cuda:
        torch.cuda.synchronize()

"""The interface of scheduling policies.

A policy is told what is pending and what the lanes carry, and says what goes out next. It reads no clock,
takes no lock and touches no device, so the same code runs in the dispatcher and in a simulation.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch_mux.runtime.scheduler.pending import Flow
from torch_mux.settings import Settings
from torch_mux.types import Quota

__all__ = ["Busy", "Decision", "Issue", "LaneLoad", "Later", "Policy", "Queue", "Ticket", "View", "share_of"]


class Ticket(Protocol):
    """What a policy may know of a request."""

    @property
    def arrival(self) -> float:
        """Seconds on the clock when it was submitted."""
        ...

    @property
    def client(self) -> int:
        """Identity of the submitting thread."""
        ...

    @property
    def seq(self) -> int:
        """Its place in the order of submission."""
        ...

    @property
    def quota(self) -> Quota:
        """Tenant and limits it runs under."""
        ...

    @property
    def due(self) -> float:
        """Seconds on the clock by which it should have ended, or infinity."""
        ...


class Queue(Protocol):
    """What a policy may know of the pending requests of one program; never empty."""

    @property
    def key(self) -> str:
        """Identity of the program."""
        ...

    @property
    def ready(self) -> bool:
        """Whether its plan is compiled; what is not ready cannot go out."""
        ...

    @property
    def slots(self) -> int:
        """Most slots that one bundle of it may have, 1 where nothing coalesces."""
        ...

    @property
    def ordered(self) -> bool:
        """Whether its bundles must run in order, on the first lane."""
        ...

    @property
    def timed(self) -> bool:
        """Whether some of its requests may be due at some time."""
        ...

    @property
    def requests(self) -> Collection[Ticket]:
        """Its pending requests, oldest first."""
        ...

    def flows(self) -> Mapping[Flow, Collection[Ticket]]:
        """The same by flow, each oldest first; sorted out when it is first asked for."""
        ...

    def fresh(self) -> Sequence[Flow]:
        """The flows that had nothing pending when this was last asked, or since."""
        ...


@dataclass(frozen=True)
class LaneLoad:
    """Bundles enqueued on one lane that the device has not finished."""

    bundles: int = 0


class View(NamedTuple):
    """Everything pending, the queue with the oldest request first, and the load of every lane."""

    queues: Sequence[Queue]
    lanes: Sequence[LaneLoad]


@dataclass(frozen=True, eq=False)
class Issue:
    """These requests of one program go out now.

    Attributes:
        key: the program.
        requests: in slot order; all from that program's queue.
        share: cap of the bundle, a fraction in (0, 1].
        lane: index of the lane.
        neighbours: bundles under way on other lanes.
        start: virtual time at which it goes out, or None when nothing that can run is left behind.
    """

    key: str
    requests: Sequence[Ticket]
    share: float
    lane: int = 0
    neighbours: int = 0
    start: float | None = None


@dataclass(frozen=True)
class Later:
    """Nothing goes out before the clock shows ``until``.

    Ask again sooner when the queue of a program in ``wake`` has so many requests, or when a request arrives
    for a program that is not in it.
    """

    until: float
    wake: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Busy:
    """Nothing goes out before a lane finishes a bundle.

    With ``wake`` given, ask again sooner as for :class:`Later`; None says that every lane is full.
    """

    wake: Mapping[str, int] | None = None


Decision = Issue | Later | Busy | None


class Policy(Protocol):
    """Decides who goes out together, in which order and under which cap."""

    def form(self, view: View, now: float, settings: Settings) -> Decision:
        """What to do now; None when nothing that is pending can run. Changes nothing."""
        ...

    def issued(self, issue: Issue, now: float) -> None:
        """``issue`` has been taken out of the queues."""
        ...

    def completed(self, issue: Issue, now: float, seconds: float) -> None:
        """The device finished what was issued after ``seconds``, 0 if it did not run.

        An issue that :meth:`issued` was not told of is what was left of one that completed after 0 seconds.
        """
        ...

    def outlook(self, key: str, slots: int, bundles: int, now: float) -> float | None:
        """When so many bundles of that many slots would have ended that are enqueued now, if it can tell.

        Any thread may ask; all other methods are the dispatcher's.
        """
        ...

    def forget(self, key: str) -> None:
        """The program was dropped."""
        ...


def share_of(requests: Sequence[Ticket]) -> float:
    """Cap of a bundle: the sum of its distinct tenants' ``sms``, at most 1.

    A tenant whose requests carry different limits, because its quota was changed meanwhile, counts with the
    largest.
    """
    limits: dict[str, float] = {}
    last: Quota | None = None
    for request in requests:
        quota = request.quota
        if quota is not last:
            last = quota
            limits[quota.tenant] = max(limits.get(quota.tenant, 0.0), quota.sms)
    return min(1.0, sum(limits.values()))

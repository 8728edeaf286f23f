"""The interface of scheduling policies.

A policy is told what is pending and what the lanes carry, and says what goes out next. It reads no clock,
takes no lock and touches no device, so the same code runs in the dispatcher and in a simulation.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, Protocol

from torch_mux.runtime.scheduler.pending import Flow
from torch_mux.settings import Settings
from torch_mux.types import Quota

__all__ = [
    "Busy",
    "Decision",
    "Issue",
    "LaneKind",
    "LaneLoad",
    "Later",
    "Policy",
    "Queue",
    "QueueName",
    "Ticket",
    "View",
    "idle_lanes",
    "lane_kinds",
    "share_of",
]

#: A program, and whether it is the queue of its tenants with a reserve.
QueueName = tuple[str, bool]


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
    """What a policy may know of pending requests of one program; never empty."""

    @property
    def key(self) -> str:
        """Identity of the program."""
        ...

    @property
    def reserved(self) -> bool:
        """Whether it holds the requests of tenants with a reserve, who have a lane of their own."""
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
    def due(self) -> float:
        """Seconds on the clock when one of its requests is due, at the earliest; or infinity."""
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


class LaneKind(Enum):
    """Who a lane is for.

    ``COMMON``: everybody without a reserve, on the whole device. ``RESERVED``: tenants with a reserve; its
    work goes first. ``CONFINED``: those without one while a reserve is in use, where that is another lane.
    ``PASSING``: those without one who go before long bundles that are under way, between two segments.
    """

    COMMON = "common"
    RESERVED = "reserved"
    CONFINED = "confined"
    PASSING = "passing"

    __hash__ = object.__hash__  # lanes are looked up by kind several times a decision; that of Enum is Python


@dataclass(frozen=True)
class LaneLoad:
    """Bundles enqueued on one lane that the device has not finished.

    Attributes:
        branch: bundles of programs whose home is that branch go there, and of no others; None: of all.
    """

    bundles: int = 0
    kind: LaneKind = LaneKind.COMMON
    branch: int | None = None


def idle_lanes(settings: Settings, branches: int = 1) -> tuple[LaneLoad, ...]:
    """The lanes of a device by index, with nothing under way; bundles that keep their order use the first.

    Args:
        branches: of each common lane; those besides the first come behind all other lanes.
    """
    common = max(1, settings.lanes)
    kinds = [LaneKind.COMMON] * common
    if settings.isolation != "off":
        kinds.append(LaneKind.RESERVED)
    if settings.isolation == "green":
        kinds.append(LaneKind.CONFINED)
    elif settings.segment is not None:
        kinds.append(LaneKind.PASSING)
    numbers = iter(range(common * branches))
    kinds += [LaneKind.COMMON] * (common * (branches - 1))
    several = branches > 1
    return tuple(
        LaneLoad(0, kind, next(numbers) % branches if several and kind is LaneKind.COMMON else None)
        for kind in kinds
    )


def lane_kinds(settings: Settings, branches: int = 1) -> tuple[LaneKind, ...]:
    """What each of :func:`idle_lanes` is for."""
    return tuple(lane.kind for lane in idle_lanes(settings, branches))


class View(NamedTuple):
    """What is pending and what the lanes carry.

    Attributes:
        queues: everything pending, in any order.
        lanes: the load of every lane.
        usable: indices of the lanes that bundles may go on; None: all. Those that must keep their order go on
            the first lane whatever this says.
        fresh: those to which something new came since the last decision: the first request, the first of a
            flow, or the first that is due at some time. None: all of them.
    """

    queues: Collection[Queue]
    lanes: Sequence[LaneLoad]
    usable: Sequence[int] | None = None
    fresh: Collection[Queue] | None = None


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
        reserved: whether its tenants have a reserve.
        reserve: part of the device that is set aside for tenants with a reserve.
        branch: which of its lane's branches that is, if it has several.
        beside: what it keeps to, a fraction of the device, so that bundles on other branches have room.
        kept: part of it that is kept for them now, since a reserve is in use.
        passes: it goes before bundles of the other lanes, which stop for it at the end of a segment.
    """

    key: str
    requests: Sequence[Ticket]
    share: float
    lane: int = 0
    neighbours: int = 0
    start: float | None = None
    reserved: bool = False
    reserve: float = 0.0
    branch: int | None = None
    beside: float = 1.0
    kept: float = 0.0
    passes: bool = False

    @property
    def queue(self) -> QueueName:
        """Where its requests were pending."""
        return self.key, self.reserved


@dataclass(frozen=True)
class Later:
    """Nothing goes out before the clock shows ``until``.

    Ask again sooner when a queue in ``wake`` has so many requests, or when a request arrives for a queue that
    is not in it.
    """

    until: float
    wake: Mapping[QueueName, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Busy:
    """Nothing goes out before a lane finishes a bundle, or one is overdue.

    With ``wake`` given, ask again sooner as for :class:`Later`; None says that every lane is full.

    Attributes:
        until: seconds on the clock when a lane will probably have finished one, where that can be told.
    """

    wake: Mapping[QueueName, int] | None = None
    until: float | None = None


Decision = Issue | Later | Busy | None


class Policy(Protocol):
    """Decides who goes out together, in which order and under which cap."""

    def form(self, view: View, now: float, settings: Settings) -> Decision:
        """What to do now; None when nothing that is pending can run. Changes nothing."""
        ...

    def everything(self, view: View, now: float, settings: Settings) -> Sequence[Issue]:
        """All that is pending, a bundle a program, where nobody has to wait for anybody then; else none.

        They all go out, or the policy is asked what to do by :meth:`form`. Changes nothing.
        """
        ...

    def next_end(self) -> float | None:
        """Seconds on the clock when a bundle under way will probably have ended; None where there is none."""
        ...

    def issued(self, issue: Issue, now: float) -> None:
        """``issue`` has been taken out of the queues."""
        ...

    def completed(self, issue: Issue, now: float, seconds: float, charge: float | None = None) -> None:
        """The device finished what was issued after ``seconds``, 0 if it did not run.

        ``charge`` is what of the device's busy time is its own, where bundles on other branches overlapped.
        An issue that :meth:`issued` was not told of is what was left of one that completed after 0 seconds.
        """
        ...

    def outlook(self, key: str, slots: int, bundles: int, now: float, reserved: bool = False) -> float | None:
        """When so many bundles of that many slots would have ended that are enqueued now, if it can tell.

        Any thread may ask; all other methods are the dispatcher's.

        Args:
            reserved: whether they are of tenants with a reserve.
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
            if quota.sms >= 1.0:
                return 1.0
            last = quota
            limits[quota.tenant] = max(limits.get(quota.tenant, 0.0), quota.sms)
    return min(1.0, sum(limits.values()))

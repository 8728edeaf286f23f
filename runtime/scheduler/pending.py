"""The pending requests of one program, in order of arrival and by flow."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Generic, NamedTuple, Protocol, TypeVar

from torch_mux.types import Quota

__all__ = ["Flow", "Pending", "Standing"]

_NEVER = float("inf")
#: (priority class, tenant): whose requests go out in order.
Flow = tuple[int, str]


class Standing(NamedTuple):
    """What a new request finds pending.

    Attributes:
        own: requests of its class and tenant.
        others: of other tenants of its class.
        higher: of higher classes.
        rivals: the weights of those others, over its tenant's own.
    """

    own: int
    others: int
    higher: int
    rivals: float

    def ahead(self, own: int, others: int, load: float, rivals: float) -> int:
        """How many go out before it: nobody of its class has more of them than his weight is worth.

        Args:
            own: of its class and tenant, that are queued together with it, before it.
            others: likewise, of others.
            load: part of what can go out that does; so many more come meanwhile and may go before it.
            rivals: the weight of those that it competes with, over its own.
        """
        mine = self.own + own
        fair = (mine + 1) * rivals
        come = (self.others + others + load * mine) / max(1e-3, 1.0 - load)
        return self.higher + mine + math.ceil(min(come, fair))


class _Owned(Protocol):
    @property
    def quota(self) -> Quota: ...

    @property
    def due(self) -> float: ...


T = TypeVar("T", bound=_Owned)


class _Class:
    """The pending requests of one priority class, in numbers.

    Attributes:
        count: how many there are.
        weights: of the tenants that have any.
        weight: the sum of these.
    """

    __slots__ = ("count", "weight", "weights")

    def __init__(self) -> None:
        self.count = 0
        self.weights: dict[str, float] = {}
        self.weight = 0.0


class Pending(Collection[T], Generic[T]):
    """A queue out of which any request can be taken at once, whatever its place.

    What belongs to whom is sorted out when it is first asked for, and kept up from then on until the queue is
    empty: while everything that is pending goes out together nobody asks.

    Args:
        weight: the weight of a quota.

    Attributes:
        due: when a request is due, at the earliest, that was queued since it was last empty; or infinity.
        stirred: whether something new came: the first request, the first of a flow, or the first that is due
            at some time. Whoever has seen it sets it back.
    """

    __slots__ = ("_all", "_classes", "_flows", "_fresh", "_weight", "due", "stirred")

    def __init__(self, weight: Callable[[Quota], float] = attrgetter("weight")) -> None:
        self._weight = weight
        self._all: OrderedDict[T, None] = OrderedDict()
        self._flows: dict[Flow, deque[T]] | None = None
        self._classes: dict[int, _Class] = {}
        self._fresh: list[Flow] = []
        self.due, self.stirred = _NEVER, False

    @property
    def timed(self) -> bool:
        """Whether a request that is due at some time was queued since it was last empty."""
        return self.due < _NEVER

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[T]:
        return iter(self._all)

    def __contains__(self, request: object) -> bool:
        return request in self._all

    @property
    def oldest(self) -> T:
        """The first of them; there must be one."""
        return next(iter(self._all))

    def extend(self, requests: Sequence[T]) -> None:
        """Queues requests behind all others."""
        if not self._all:
            self.stirred = True
        self._all.update(dict.fromkeys(requests))
        soonest = min([request.due for request in requests], default=_NEVER)
        if soonest < self.due:
            self.stirred = self.stirred or self.due == _NEVER
            self.due = soonest
        if self._flows is not None:
            for request in requests:
                self._flow(request).append(request)

    def append(self, request: T) -> None:
        """Queues a request behind all others."""
        self.extend((request,))

    def appendleft(self, request: T) -> None:
        """A request that had been taken out becomes the oldest again."""
        self._all[request] = None
        self._all.move_to_end(request, last=False)
        self.stirred = True
        self.due = min(self.due, request.due)
        if self._flows is not None:
            self._flow(request).appendleft(request)

    def take(self, requests: Sequence[T]) -> None:
        """Takes these out; each of them must be pending."""
        if len(requests) == len(self._all):
            self._all.clear()
            self._flows = None
            self.due = _NEVER
            return
        for request in requests:
            del self._all[request]
        if self._flows is not None:
            for request in requests:
                quota = request.quota
                flow = (quota.priority, quota.tenant)
                own, level = self._flows[flow], self._classes[quota.priority]
                level.count -= 1
                if own[0] is request:
                    own.popleft()
                else:
                    own.remove(request)
                if not own:
                    del self._flows[flow]
                    level.weight -= level.weights.pop(quota.tenant)
                    if not level.weights:
                        del self._classes[quota.priority]

    def flows(self) -> Mapping[Flow, Collection[T]]:
        """The pending requests by class and tenant, each oldest first; none of the collections is empty."""
        if self._flows is None:
            self._flows, self._fresh, self._classes = {}, [], {}
            for request in self._all:
                self._flow(request).append(request)
        return self._flows

    def standing(self, quota: Quota) -> Standing:
        """What a new request of that quota would find."""
        own = len(self.flows().get((quota.priority, quota.tenant), ()))
        count = higher = 0
        rivals = 0.0
        for priority, one in self._classes.items():
            if priority > quota.priority:
                higher += one.count
            elif priority == quota.priority:
                count = one.count
                rivals = (one.weight - one.weights.get(quota.tenant, 0.0)) / self._weight(quota)
        return Standing(own, count - own, higher, rivals)

    def fresh(self) -> Sequence[Flow]:
        """The flows that had nothing pending when this was last asked, or since."""
        self.flows()
        if not self._fresh:
            return ()
        fresh, self._fresh = self._fresh, []
        return fresh

    def _flow(self, request: T) -> deque[T]:
        """The flow that a request is added to."""
        assert self._flows is not None
        quota = request.quota
        flow = (quota.priority, quota.tenant)
        own, level = self._flows.get(flow), self._classes.get(quota.priority)
        if level is None:
            level = self._classes[quota.priority] = _Class()
        level.count += 1
        if own is None:
            own = self._flows[flow] = deque()
            level.weights[quota.tenant] = weight = self._weight(quota)
            level.weight += weight
            self._fresh.append(flow)
            self.stirred = True
        return own

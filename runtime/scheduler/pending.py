"""The pending requests of one program, in order of arrival and by flow."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

from torch_mux.types import Quota

__all__ = ["Flow", "Pending"]

_NEVER = float("inf")
#: (priority class, tenant): whose requests go out in order.
Flow = tuple[int, str]


class _Owned(Protocol):
    @property
    def quota(self) -> Quota: ...

    @property
    def due(self) -> float: ...


T = TypeVar("T", bound=_Owned)


class Pending(Collection[T], Generic[T]):
    """A queue out of which any request can be taken at once, whatever its place.

    What belongs to whom is sorted out when it is first asked for, and kept up from then on until the queue is
    empty: while everything that is pending goes out together nobody asks.

    Attributes:
        timed: whether a request that is due at some time was queued since it was last empty.
        stirred: whether something new came: the first request, the first of a flow, or the first that is due
            at some time. Whoever has seen it sets it back.
    """

    __slots__ = ("_all", "_flows", "_fresh", "stirred", "timed")

    def __init__(self) -> None:
        self._all: OrderedDict[T, None] = OrderedDict()
        self._flows: dict[Flow, deque[T]] | None = None
        self._fresh: list[Flow] = []
        self.timed = self.stirred = False

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
        if not self.timed and [request for request in requests if request.due < _NEVER]:
            self.timed = self.stirred = True
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
        self.timed = self.timed or request.due < _NEVER
        if self._flows is not None:
            self._flow(request).appendleft(request)

    def take(self, requests: Sequence[T]) -> None:
        """Takes these out; each of them must be pending."""
        if len(requests) == len(self._all):
            self._all.clear()
            self._flows = None
            self.timed = False
            return
        for request in requests:
            del self._all[request]
        if self._flows is not None:
            for request in requests:
                quota = request.quota
                flow = (quota.priority, quota.tenant)
                own = self._flows[flow]
                if own[0] is request:
                    own.popleft()
                else:
                    own.remove(request)
                if not own:
                    del self._flows[flow]

    def flows(self) -> Mapping[Flow, Collection[T]]:
        """The pending requests by class and tenant, each oldest first; none of the collections is empty."""
        if self._flows is None:
            self._flows = {}
            self._fresh = []
            for request in self._all:
                self._flow(request).append(request)
        return self._flows

    def of(self, quota: Quota) -> int:
        """How many requests of that class and tenant are pending."""
        return len(self.flows().get((quota.priority, quota.tenant), ()))

    def fresh(self) -> Sequence[Flow]:
        """The flows that had nothing pending when this was last asked, or since."""
        self.flows()
        if not self._fresh:
            return ()
        fresh, self._fresh = self._fresh, []
        return fresh

    def _flow(self, request: T) -> deque[T]:
        assert self._flows is not None
        quota = request.quota
        flow = (quota.priority, quota.tenant)
        own = self._flows.get(flow)
        if own is None:
            own = self._flows[flow] = deque()
            self._fresh.append(flow)
            self.stirred = True
        return own

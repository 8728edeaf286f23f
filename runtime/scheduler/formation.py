"""Which of a program's pending requests share a bundle, when not all of them may."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from heapq import heapify, heappop, heappush, heapreplace
from itertools import islice
from types import MappingProxyType

from torch_mux.runtime.scheduler.base import Queue, Ticket
from torch_mux.runtime.scheduler.fair import Account, VirtualTime
from torch_mux.runtime.scheduler.pending import Flow
from torch_mux.types import Quota

__all__ = ["Turns"]

_NEVER = float("inf")
#: Start tag, age, tenant, account; and while a bundle is filled, the next request and the others.
_Entry = tuple[float, float, str, Account, "Ticket | None", "Iterator[Ticket] | None"]
_Flows = Mapping[Flow, Collection[Ticket]]
_NOBODY: Mapping[Flow, float] = MappingProxyType({})


class Turns:
    """The flows of one queue by start tag, a heap for each class.

    Tags only grow, so an entry whose tag has changed is put right when it comes to the top.

    Args:
        weight: the weight of a quota.

    Attributes:
        members: the flows in the heaps; some of them may have nothing pending any more.
    """

    def __init__(self, queue: Queue, weight: Callable[[Quota], float]) -> None:
        self.queue = queue
        self._weight = weight
        self.members: set[Flow] = set()
        self._heaps: dict[int, list[_Entry]] = {}

    def stir(self, times: Callable[[int], VirtualTime]) -> Iterable[int]:
        """Takes in the flows that had nothing pending before; returns the classes.

        Args:
            times: the virtual time of a class.
        """
        flows = self.queue.flows()
        for flow in self.queue.fresh() if self._heaps else flows:
            account, tickets = times(flow[0]).arrived(flow[1]), flows.get(flow)
            if tickets is not None and flow not in self.members:
                self.members.add(flow)
                heap = self._heaps.setdefault(flow[0], [])
                heappush(heap, (account.tag, next(iter(tickets)).seq, flow[1], account, None, None))
        return self._heaps

    @property
    def single(self) -> bool:
        """Whether all that is pending is one flow's."""
        return len(self.queue.flows()) == 1

    def first(self, priority: int) -> tuple[float, int, float] | None:
        """(start tag, age, weight) of who is first in that class, or None when nothing of it is pending."""
        heap, flows = self._heaps.get(priority), self.queue.flows()
        while heap:
            tag, _, name, account, _, _ = heap[0]
            tickets = flows.get((priority, name))
            if tickets is None:
                heappop(heap)
                self.members.discard((priority, name))
                continue
            head = next(iter(tickets))
            if tag == account.tag:
                return tag, head.seq, self._weight(head.quota)
            heapreplace(heap, (account.tag, head.seq, name, account, None, None))
        return None

    def fill(
        self,
        limit: int,
        each: float,
        ceilings: Mapping[int, float],
        allowance: float,
        top: int | None = None,
        urgent: Mapping[Flow, float] = _NOBODY,
    ) -> tuple[Ticket, ...]:
        """At most ``limit`` requests in fair order: by class, then by start tag, then by age.

        Where everything may go, everything goes, in order of arrival; so do the requests of a program whose
        calls depend on each other. While a class waits for another bundle no lower one rides along.

        Args:
            urgent: flows whose first request goes before all others of its class, with when it is due.
            each: device seconds that a slot is charged.
            ceilings: by class, the least start tag of those who wait for another bundle or are expected back
                to; none where nobody does.
            top: the highest class that waits for another bundle.
            allowance: device seconds by which a tenant may be served ahead of them.
        """
        requests, flows = self.queue.requests, self.queue.flows()
        if self.queue.ordered:
            return tuple(islice(requests, limit))
        if len(requests) <= limit:
            if not ceilings or not self._ahead(flows, each, ceilings, allowance, top):
                return tuple(requests)
        elif len(flows) == 1 and not ceilings:
            return tuple(islice(requests, limit))
        taken: list[Ticket] = []
        for priority in sorted(self._heaps, reverse=True):
            if taken and top is not None and priority < top:
                break
            bar = ceilings.get(priority, _NEVER)
            heap = self._heaps[priority].copy()
            if urgent:
                heap = [
                    entry if (due := urgent.get((priority, entry[2]))) is None else (-_NEVER, due, *entry[2:])
                    for entry in heap
                ]
                heapify(heap)
            self._in_order(heap, priority, taken, limit, each, bar, allowance)
        return tuple(taken)

    def _ahead(
        self, flows: _Flows, each: float, ceilings: Mapping[int, float], allowance: float, top: int | None
    ) -> bool:
        """Whether somebody would be served further ahead than the allowance if everything went."""
        for priority, heap in self._heaps.items():
            bar = ceilings.get(priority, _NEVER)
            for _, _, name, account, _, _ in heap:
                tickets = flows.get((priority, name))
                if tickets is not None:
                    if top is not None and priority < top:
                        return True
                    ahead = (account.tag - bar) * self._weight(next(iter(tickets)).quota)
                    if ahead + (len(tickets) - 1) * each > allowance:
                        return True
        return False

    def _in_order(
        self,
        heap: list[_Entry],
        priority: int,
        taken: list[Ticket],
        limit: int,
        each: float,
        bar: float,
        allowance: float,
    ) -> None:
        """Adds requests of one class to ``taken``; the heap is used up."""
        flows = self.queue.flows()
        while heap and len(taken) < limit:
            tag, _, name, account, head, rest = heap[0]
            if head is None or rest is None:
                tickets = flows.get((priority, name))
                if tickets is None:
                    heappop(heap)
                    continue
                rest = iter(tickets)
                head = next(rest)
                if tag != account.tag and tag > -_NEVER:
                    heapreplace(heap, (account.tag, head.seq, name, account, head, rest))
                    continue
            weight = self._weight(head.quota)
            if taken and (tag - bar) * weight > allowance:
                heappop(heap)
                continue
            if tag == -_NEVER:
                tag = account.tag
            taken.append(head)
            following = next(rest, None)
            if following is None:
                heappop(heap)
            else:
                heapreplace(heap, (tag + each / weight, following.seq, name, account, following, rest))

"""The pending requests of one program that go out on the same lanes."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING

from torch_mux.runtime.request import Request
from torch_mux.runtime.scheduler.base import QueueName
from torch_mux.runtime.scheduler.delays import Delay
from torch_mux.runtime.scheduler.pace import Pace
from torch_mux.runtime.scheduler.pending import Flow, Pending, Standing
from torch_mux.types import Quota

if TYPE_CHECKING:
    from torch_mux.runtime.served import ServedProgram

__all__ = ["ProgramQueue"]

#: Classes that are told apart; the requests of all others learn from each other.
_CLASSES = 64


class ProgramQueue:
    """A queue of one program, as a policy sees it; guarded by the dispatcher's mutex.

    Attributes:
        reserved: whether it is that of tenants with a reserve.
        requests: oldest first.
        key: identity of the program.
        name: what tells it from all other queues.
        pace: how fast its bundles go out and end, from the moment on in which that was ``asked`` for.
    """

    __slots__ = ("_delays", "_served", "asked", "key", "name", "pace", "requests", "reserved")

    def __init__(self, served: ServedProgram, reserved: bool) -> None:
        self._served = weakref.ref(served)  # which holds this: its tables on the device go when it does
        self.reserved = reserved
        self.requests: Pending[Request] = Pending(attrgetter("reserve" if reserved else "weight"))
        self.key = served.key
        self.name: QueueName = (served.key, reserved)
        self.pace, self.asked = Pace(), False
        self._delays: dict[int, Delay] = {}

    @property
    def served(self) -> ServedProgram:
        """The program.

        Raises:
            ReferenceError: it was dropped.
        """
        found = self._served()
        if found is None:
            raise ReferenceError(f"the program of queue {self.name} was dropped")
        return found

    @property
    def ready(self) -> bool:
        """Whether its plan is compiled."""
        return self.served.ready

    @property
    def slots(self) -> int:
        """Most slots of one bundle."""
        return self.served.slots

    @property
    def ordered(self) -> bool:
        """Whether its bundles must run in order, on the first lane."""
        return self.served.ordered

    @property
    def timed(self) -> bool:
        """Whether some of its requests may be due at some time."""
        return self.requests.timed

    @property
    def due(self) -> float:
        """When one of its requests is due, at the earliest."""
        return self.requests.due

    def flows(self) -> Mapping[Flow, Collection[Request]]:
        """The queue by class and tenant."""
        return self.requests.flows()

    def fresh(self) -> Sequence[Flow]:
        """The flows that are new in it."""
        return self.requests.fresh()

    def delay(self, priority: int) -> Delay:
        """By how much requests of a class took longer than forecast."""
        found = self._delays.get(priority)
        if found is None:
            if len(self._delays) >= _CLASSES:
                return next(iter(self._delays.values()))
            found = self._delays.setdefault(priority, Delay())
        return found

    def standing(self, quota: Quota) -> Standing:
        """What a new request of that quota would be queued behind; those that must keep their order, all."""
        found = self.requests.standing(quota)
        return found._replace(rivals=float("inf")) if self.ordered else found

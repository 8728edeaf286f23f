"""Closed-loop clients of a simulated device: each asks again a moment after the device has answered."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from heapq import heapify, heappop, heappush
from itertools import count
from typing import NamedTuple

from simulated import Device

from torch_mux.runtime.scheduler.policy import FairPolicy
from torch_mux.settings import Settings
from torch_mux.types import Quota

__all__ = ["Client", "ClosedLoop"]


class Client(NamedTuple):
    """A tenant: its program, its weight, and how many clients it has."""

    key: str
    weight: float = 1.0
    clients: int = 1


class ClosedLoop:
    """Runs clients against a policy and sees what each tenant is served.

    Args:
        seconds: device seconds of a bundle, of its program and slots.
        away: seconds from an answer until the client asks again, drawn for each.

    Attributes:
        served: device seconds by tenant since :meth:`begin`.
        idle: device seconds in which nothing flew though something was pending.
        longest_idle: the longest stretch of it.
    """

    def __init__(
        self,
        tenants: Mapping[str, Client],
        seconds: Callable[[str, int], float],
        away: Callable[[random.Random], float] = lambda draw: draw.uniform(30e-6, 70e-6),
        **settings: float,
    ) -> None:
        self.tenants = tenants
        self.policy = FairPolicy()
        self.device = Device(self.policy, Settings(**settings), seconds)  # type: ignore[arg-type]
        self.served: Counter[str] = Counter()
        self.answers = 0
        self.idle = self.longest_idle = self._stretch = 0.0
        self._away = away
        self._draw = random.Random(1)
        self._numbers = count()
        self._coming: list[tuple[float, int, str]] = []
        for name, tenant in tenants.items():
            for _ in range(tenant.clients):
                heappush(self._coming, (0.0, next(self._numbers), name))

    def joins(self, name: str, moment: float) -> None:
        """The clients of a tenant begin only then."""
        self._coming = [(moment if one[2] == name else one[0], *one[1:]) for one in self._coming]
        heapify(self._coming)

    def run(self, until: float) -> None:
        """Goes on to that time of the virtual clock."""
        device = self.device
        while device.now < until:
            wake, before = device.dispatch(), device.now
            pending = any(queue.requests for queue in device.queues.values())
            idles = pending and not any(device._lanes)
            moment = min(wake, self._coming[0][0] if self._coming else until, until)
            ended = next(iter(device.advance(max(moment, before))), None)
            self._stretch = self._stretch + device.now - before if idles else 0.0
            self.idle += device.now - before if idles else 0.0
            self.longest_idle = max(self.longest_idle, self._stretch)
            if ended is not None:
                seconds = device.seconds(ended.key, len(ended.requests))
                for request in ended.requests:
                    self.served[request.quota.tenant] += seconds / len(ended.requests)  # type: ignore[assignment]
                    self.answers += 1
                    back = device.now + self._away(self._draw)
                    heappush(self._coming, (back, request.client, request.quota.tenant))
            while self._coming and self._coming[0][0] <= device.now:
                _, client, name = heappop(self._coming)
                tenant = self.tenants[name]
                device.submit(tenant.key, Quota(name, weight=tenant.weight), client)

    def begin(self) -> None:
        """From now on services are counted."""
        self.served.clear()
        self.idle = self.longest_idle = 0.0

    def shares(self) -> dict[str, float]:
        """Part of the device time by tenant."""
        whole = sum(self.served.values())
        return {name: self.served[name] / whole for name in self.tenants}

    def granted(self, name: str) -> float:
        """The part that its weight grants."""
        return self.tenants[name].weight / sum(tenant.weight for tenant in self.tenants.values())

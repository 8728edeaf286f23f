"""A bundle: the slots that go out together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch_mux.runtime.request import Request
from torch_mux.runtime.scheduler.base import Issue
from torch_mux.runtime.served import ServedProgram

__all__ = ["Bundle", "cap_of"]


@dataclass(eq=False)
class Bundle:
    """Requests of one program that go out together.

    Attributes:
        served: the program.
        requests: one a slot, in slot order.
        issue: the decision that sent it out.
        again: it found no memory once and is run again.
        seconds: device seconds it took, once known.
        coalesced: it runs on a coalesced plan.
        measured: its time is the device's own.
    """

    served: ServedProgram
    requests: list[Request]
    issue: Issue
    again: bool = False
    seconds: float = field(default=0.0)
    coalesced: bool = False
    measured: bool = False

    @property
    def share(self) -> float:
        """Its cap as a fraction of the device's multiprocessors."""
        return self.issue.share

    @property
    def ranges(self) -> list[str]:
        """What a profiler shows around its launch, from the outside in."""
        whole = f"mux::bundle {self.served.program.name} x{len(self.requests)}"
        tenants = dict.fromkeys(request.quota.tenant for request in self.requests)
        return [whole, *(f"mux::tenant {tenant}" for tenant in tenants)]

    @property
    def lane(self) -> int:
        """Which lane it runs on."""
        return self.issue.lane


def cap_of(share: float, sms: int) -> int:
    """The cap in multiprocessors: ``share`` of ``sms``, rounded up, at least one."""
    return max(1, min(sms, math.ceil(share * sms - 1e-9)))

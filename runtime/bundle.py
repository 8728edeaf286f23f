"""A bundle: the slots that go out together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch_mux.runtime.request import Request
from torch_mux.runtime.scheduler.base import Issue
from torch_mux.runtime.served import ServedProgram
from torch_mux.runtime.verdicts import MixRun

__all__ = ["Bundle", "cap_of"]


@dataclass(eq=False, slots=True)
class Bundle:
    """Requests of one program that go out together.

    Attributes:
        served: the program.
        requests: one a slot, in slot order.
        issue: the decision that sent it out.
        again: it found no memory once and is run again.
        mix: what it went out as one with, itself included; "" where it went out by itself.
        part: its part of the work of that.
        leads: whether it stands for all of that in a picture of the device.
        whole: device seconds that took, once known.
        seconds: its own part of them.
        coalesced: it runs on a coalesced plan.
        run: it and the other bundles of its mix, which went out at the same moment.
    """

    served: ServedProgram
    requests: list[Request]
    issue: Issue
    again: bool = False
    mix: str = field(default="")
    part: float = field(default=1.0)
    leads: bool = field(default=True)
    whole: float = field(default=0.0)
    seconds: float = field(default=0.0)
    coalesced: bool = False
    run: MixRun | None = None

    @property
    def work(self) -> int:
        """Floating-point operations of all its requests."""
        return sum([request.work for request in self.requests])

    @property
    def share(self) -> float:
        """Its cap as a fraction of the device's multiprocessors."""
        return self.issue.share

    @property
    def limit(self) -> float:
        """What it keeps to, a fraction of the device: its cap, or less where others run beside it."""
        return min(self.issue.share, self.issue.beside)

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

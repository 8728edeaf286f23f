"""A bundle: the slots that go out together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch_mux.runtime.request import Request
from torch_mux.runtime.served import ServedProgram

__all__ = ["Bundle", "cap_of"]


@dataclass(eq=False)
class Bundle:
    """Requests of one program that go out together.

    Attributes:
        served: the program.
        requests: one a slot, in slot order.
        share: its cap as a fraction of the device's multiprocessors.
        lane: which lane it runs on.
        again: it found no memory once and is run again.
        seconds: device seconds it took, once known.
    """

    served: ServedProgram
    requests: list[Request]
    share: float
    lane: int = 0
    again: bool = False
    seconds: float = field(default=0.0)


def cap_of(share: float, sms: int) -> int:
    """The cap in multiprocessors: ``share`` of ``sms``, rounded up, at least one."""
    return max(1, min(sms, math.ceil(share * sms - 1e-9)))

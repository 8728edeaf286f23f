"""Open-loop arrivals, computed before the run and the same for every server: seeded and replayable."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

__all__ = ["PROCESSES", "Arrival", "arrivals"]

#: Coefficient of variation of the gaps between arrivals, by name. 1 is a Poisson process; the bursty one is
#: what BurstGPT (arXiv 2401.17644) and others fit to traces of inference services: Gamma gaps.
PROCESSES: Final = {"poisson": 1.0, "bursty": 4.0}


@dataclass(frozen=True)
class Arrival:
    """One request.

    Attributes:
        time: seconds from the start of the run.
        tenant: who asks.
        variant: which of that tenant's inputs.
    """

    time: float
    tenant: int
    variant: int


def arrivals(process: str, rates: Sequence[float], seconds: float, variants: int, seed: int) -> list[Arrival]:
    """Requests in the order of their times, about ``sum(rates) * seconds`` of them.

    Each tenant has an arrival process of its own, so a burst is one tenant's.

    Args:
        process: a name in ``PROCESSES``.
        rates: requests a second of each tenant; 0 for one that sends none.
        seed: the same seed gives the same arrivals; at another rate the same ones, closer together.

    Raises:
        KeyError: an unknown process.
        ValueError: a negative rate, or a duration that is not positive.
    """
    if seconds <= 0.0 or min(rates, default=0.0) < 0.0:
        raise ValueError(f"rates and seconds must be positive, not {list(rates)} and {seconds}")
    shape = 1.0 / PROCESSES[process] ** 2
    found = []
    for tenant, rate in enumerate(rates):
        if rate == 0.0:
            continue
        draw, now = random.Random(f"{seed} {tenant}"), 0.0
        while (now := now + draw.gammavariate(shape, 1.0 / shape) / rate) < seconds:
            found.append(Arrival(now, tenant, draw.randrange(variants)))
    return sorted(found, key=lambda one: one.time)

"""What a run of the load generator came to: latencies, throughput, what host and generator spent."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

__all__ = ["Got", "Outcome", "Window", "finite", "quantile"]

_QUANTILES: Final = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}


@dataclass(frozen=True)
class Window:
    """What of a run counts: ``seconds`` after the first ``lead`` ones."""

    seconds: float
    lead: float = 0.2


@dataclass(frozen=True)
class Got:
    """What one client got in the window.

    Attributes:
        offered: requests that were scheduled in it.
        served: requests that were answered in it.
        latencies: seconds of the offered ones that did not fail, from the scheduled time, in ascending order;
            infinite where there was no answer seconds after the end.
        errors: offered ones that failed, by the error's name.
    """

    offered: int
    served: int
    latencies: tuple[float, ...]
    errors: Mapping[str, int]


@dataclass(frozen=True)
class Outcome:
    """One run.

    Attributes:
        window: of the run.
        clients: what each got, in the order of the traffic.
        requests: how many were sent in all.
        lag: 0.99 quantile of seconds by which the generator itself was late with the window's open-loop
            requests: it slept too long, or waited for the interpreter.
        cost: CPU seconds a request of the generator itself.
        host: CPU seconds a request of the process in all, but for the generator's own.
        jobs: compiles and captures that ended during it, where somebody counted.
        disturbed: jobs during a first run, in whose place this one is.
        captured: what of both are graphs: program, slots and lane of each.
        probes: what the probe said at the beginning and at the end of the window, and when all had ended.
        held: 0.99 quantile of seconds by which such requests were late because the generator was inside a
            call of the server, with others, when they were due.
        asleep: what of ``cost`` went into falling asleep and waking up, which holds no interpreter.
        parts: what of ``host`` each thread had, by its name; the generator's inside the server as "submit".
    """

    window: Window
    clients: tuple[Got, ...]
    requests: int
    lag: float
    cost: float
    host: float
    jobs: int = 0
    captured: tuple[str, ...] = ()
    disturbed: int = 0
    probes: tuple[Any, ...] = field(default=(), repr=False)
    held: float = 0.0
    asleep: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)

    def _of(self, clients: Iterable[int] | None) -> list[Got]:
        return [self.clients[index] for index in (range(len(self.clients)) if clients is None else clients)]

    def quantile(self, q: float, clients: Iterable[int] | None = None) -> float:
        """Latency in seconds of these clients together; infinite where too many had no answer."""
        ordered = sorted(one for got in self._of(clients) for one in got.latencies)
        return quantile(ordered, q) if ordered else math.inf

    @property
    def p99(self) -> float:
        """Of all clients, in seconds."""
        return self.quantile(0.99)

    def throughput(self, clients: Iterable[int] | None = None) -> float:
        """Requests a second of these clients that were answered in the window."""
        return sum(got.served for got in self._of(clients)) / self.window.seconds

    @property
    def errors(self) -> Counter[str]:
        """Failed requests by the error's name."""
        return sum((Counter(got.errors) for got in self.clients), Counter())

    @property
    def missing(self) -> int:
        """Requests without an answer."""
        return sum(got.latencies.count(math.inf) for got in self.clients)

    def data(self) -> dict[str, Any]:
        """Plain data for JSON; times in seconds, None for infinite."""
        return {
            "offered": sum(got.offered for got in self.clients) / self.window.seconds,
            "answered": self.throughput(),
            "requests": self.requests,
            "missing": self.missing,
            "errors": dict(self.errors),
            "quantiles": {name: finite(self.quantile(q)) for name, q in _QUANTILES.items()},
            "lag": self.lag,
            "held": self.held,
            "generator": self.cost,
            "asleep": self.asleep,
            "host": self.host,
            "parts": dict(self.parts),
            "jobs": self.jobs,
            "captured": list(self.captured),
            "disturbed": self.disturbed,
        }


def quantile(ordered: Sequence[float], q: float) -> float:
    """The nearest-rank quantile of sorted values; there must be one."""
    return ordered[min(len(ordered) - 1, max(0, math.ceil(q * len(ordered)) - 1))]


def finite(value: float | None) -> float | None:
    """None for what JSON cannot hold."""
    return value if value is not None and math.isfinite(value) else None

"""Requests with a deadline at nine tenths of the load: those admitted are met, and hardly any is refused."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Final

import torch_mux
from torch_mux import state
from torch_mux.bench.arrivals import arrivals
from torch_mux.bench.figures.base import Finding, Row, lateness, ratio
from torch_mux.bench.figures.oracle import most_in_time
from torch_mux.bench.figures.stage import Stage
from torch_mux.bench.load import Traffic
from torch_mux.runtime.scheduler.predictor import Predictor, context
from torch_mux.runtime.timeline import BundleSpan

__all__ = ["bundle_seconds", "measure"]

#: Of the highest rate that keeps the bound.
_LOAD: Final = 0.9
_OUTCOMES: Final = ("accepted", "ok", "late", "expired", "cancelled", "errors", "refused")


def bundle_seconds(spans: Sequence[BundleSpan], most: int) -> list[float]:
    """Seconds of bundles of 1 to ``most`` requests as they were measured, never more than a larger one's."""
    predictor = Predictor()
    whole = context(1.0, 0)
    for span in spans:
        predictor.observe("", len(span.requests), whole, span.seconds)
    times = [predictor.forecast("", slots, whole).median for slots in range(1, most + 1)]
    return list(accumulate(reversed(times), min))[::-1]


def measure(stage: Stage) -> Finding:
    """All tenants of one architecture, each request with the bound as its deadline."""
    options = stage.options
    clients = stage.clients(stage.main, options.tenants, "deadline", deadline=options.bound)
    names = [client.quota["tenant"] for client in clients]
    rates = [_LOAD * stage.capacity() / len(clients)] * len(clients)

    def counted() -> Counter[str]:
        found = torch_mux.stats().tenants
        own = [found[name] for name in names if name in found]
        return Counter({what: sum(getattr(one, what) for one in own) for what in _OUTCOMES})

    traffics = [Traffic(*both) for both in zip(clients, rates, strict=True)]
    stage.settle(traffics)
    before = counted()
    with torch_mux.trace() as timeline:
        run = stage.drive(traffics, probe=counted)
    ends = {what: run.probes[-1][what] - before[what] for what in _OUTCOMES}
    seconds = run.window.seconds + run.window.lead
    trace = arrivals(options.process, rates, seconds, len(clients[0].inputs), options.seed)
    # The oracle has the device alone and no host; it may do as it likes before the window.
    inside = [one.time for one in trace if one.time >= run.window.lead]
    times = bundle_seconds(timeline.spans, state.settings().max_bundle)
    best = most_in_time(inside, options.bound, times)
    good = sum(bisect_right(got.latencies, options.bound) for got in run.clients)
    met, goodput = ratio(ends["ok"], ends["accepted"]), ratio(good, best)
    data: dict[str, Any] = {
        "deadline": options.bound,
        "arrivals": len(inside),
        "in time": good,
        "oracle": best,
        "bundle seconds": times,
        "outcomes": ends,
        "run": run.data(),
    }
    rows = (
        Row("admitted with a deadline and met", None if met is None else 100 * met, 99.9, False, "%"),
        Row("goodput of an offline oracle's", None if goodput is None else 100 * goodput, 95.0, False, "%"),
    )
    return Finding(rows, data, notes=lateness((run,)))

"""One tenant at ten times its share: what the others notice."""

from __future__ import annotations

from typing import Final

from torch_mux.bench.figures.base import Finding, Row, lateness, ratio
from torch_mux.bench.figures.stage import Stage
from torch_mux.bench.load import Traffic, finite

__all__ = ["measure"]

#: What the others ask for, of their own shares.
_LOAD: Final = 0.5
_TIMES: Final = 10.0


def measure(stage: Stage) -> Finding:
    """All tenants but one at half of their share, without and with the last one at ten times its own."""
    *others, greedy = stage.clients(stage.main, stage.options.tenants, "aggressor")
    share = stage.capacity() / stage.options.tenants
    calm = [Traffic(one, rate=_LOAD * share) for one in others]
    without = stage.drive(calm)
    beside = stage.drive([*calm, Traffic(greedy, rate=_TIMES * share)])
    among = range(len(others))
    p99 = ratio(beside.quantile(0.99, among), without.quantile(0.99, among))
    kept = ratio(beside.throughput(among), without.throughput(among))
    data = {
        "share": share,
        "without": without.data(),
        "beside": beside.data(),
        "p99": [finite(run.quantile(0.99, among)) for run in (without, beside)],
        "throughput": [run.throughput(among) for run in (without, beside)],
        "aggressor": beside.throughput([len(others)]),
    }
    rows = (
        Row("others' p99 against without", p99, 1.05),
        Row("others' throughput against without", kept, 0.98, most=False),
    )
    errors = {**without.errors, **beside.errors}
    words = (f"requests failed: {errors}",) if errors else ()
    return Finding(rows, data, words, lateness((without, beside)))

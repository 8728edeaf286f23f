"""Predicted against measured time of bundles whose composition was held out, under bursty load.

A predictor that knows nothing yet is first shown some seconds of the same load, as one that serves has been.
How near a forecast by composition can come is told beside it: what of the bundles take about as long as the
median of their like, and how those are predicted that had the device to themselves.
"""

from __future__ import annotations

import random
import statistics
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Final

import torch_mux
from torch_mux.bench.figures.base import Finding, Row
from torch_mux.bench.figures.stage import Stage
from torch_mux.bench.load import Client, Traffic
from torch_mux.runtime.scheduler.predictor import Context, Predictor, context
from torch_mux.runtime.timeline import BundleSpan

__all__ = ["by_themselves", "measure", "replay", "scattered"]

_HELD_OUT: Final = 0.25
_WITHIN: Final = 0.1
_LOAD: Final = 0.7
_LIMITS: Final = (0.25, 0.5, 1.0)
#: What is measured, and what is shown before, of a run of other figures.
_LENGTH: Final = 2.0
_SHOWN: Final = 3.0
#: Seconds by which two events may lie apart that are one, and bundles that have a median worth the name.
_SAME: Final = 5e-6
_LIKE: Final = 5
#: (program, slots, cap and neighbours): what decides how long a bundle takes.
Composition = tuple[str, int, Context]
#: (predicted, measured) seconds of a bundle.
Pair = tuple[float, float]


def compositions(spans: Sequence[BundleSpan]) -> list[Composition]:
    """What each bundle was made of; its neighbours are those under way on other lanes when it went out."""
    marks: dict[tuple[str, int], tuple[list[float], list[float]]] = {}
    for span in spans:
        issued, ended = marks.setdefault((span.device, span.lane), ([], []))
        issued.append(span.issued)
        ended.append(span.ended)
    for issued, ended in marks.values():
        issued.sort()
        ended.sort()
    found = []
    for span in spans:
        beside = sum(
            bisect_right(issued, span.issued) - bisect_right(ended, span.issued)
            for (device, lane), (issued, ended) in marks.items()
            if device == span.device and lane != span.lane
        )
        found.append((span.fingerprint, len(span.requests), context(span.share, beside)))
    return found


def by_themselves(spans: Sequence[BundleSpan]) -> set[int]:
    """Which bundles no other was at work beside on their device."""
    beside: set[int] = set()
    at_work: dict[str, list[int]] = defaultdict(list)
    begins = [span.ended - max(span.whole, span.seconds) for span in spans]
    for index in sorted(range(len(spans)), key=begins.__getitem__):
        span, begin = spans[index], begins[index] + _SAME
        others = at_work[span.device] = [one for one in at_work[span.device] if spans[one].ended > begin]
        if others:
            beside.update(others, (index,))
        others.append(index)
    return set(range(len(spans))) - beside


def scattered(spans: Sequence[BundleSpan], since: float = 0.0) -> list[Pair]:
    """(median of its like, measured) seconds of bundles of which there are several alike after ``since``."""
    alike: dict[Composition, list[float]] = defaultdict(list)
    for span, composition in zip(spans, compositions(spans), strict=True):
        if span.issued >= since and span.seconds > 0.0:
            alike[composition].append(span.seconds)
    return [
        (statistics.median(found), seconds)
        for found in alike.values()
        if len(found) >= _LIKE
        for seconds in found
    ]


def replay(spans: Sequence[BundleSpan], seed: int, since: float = 0.0) -> dict[str, list[Pair]]:
    """(predicted, measured) seconds of bundles that went out after ``since``, in the order of a run.

    The runtime's predictor is shown again, in their order, the bundles that had ended when each one went out,
    but for those of the compositions held out, a random quarter, which it never sees.

    Returns:
        ``"held out"``, and ``"seen"``: compositions that it knew or came to know; ``"by themselves"``: those
        of either that had the device to themselves.
    """
    alone = by_themselves(spans)
    named = compositions(spans)
    draw = random.Random(seed)
    held = {one for one in sorted(set(named)) if draw.random() < _HELD_OUT}
    predictor = Predictor()
    ends = sorted((span.ended, index) for index, span in enumerate(spans) if named[index] not in held)
    told = 0
    found: dict[str, list[Pair]] = defaultdict(list)
    for index in sorted(range(len(spans)), key=lambda index: spans[index].issued):
        span, (key, slots, where) = spans[index], named[index]
        while told < len(ends) and ends[told][0] <= span.issued:
            other = ends[told][1]
            predictor.observe(*named[other], spans[other].seconds)
            told += 1
        if span.issued >= since and span.seconds > 0.0:
            forecast = predictor.forecast(key, slots, where).median
            found["held out" if named[index] in held else "seen"].append((forecast, span.seconds))
            if index in alone:
                found["by themselves"].append((forecast, span.seconds))
    return found


def _within(pairs: Sequence[Pair]) -> float | None:
    """Percent of the predictions that are off by a tenth of the measured time at most."""
    good = sum(abs(predicted - measured) <= _WITHIN * measured for predicted, measured in pairs)
    return 100 * good / len(pairs) if pairs else None


def _clients(stage: Stage) -> list[Client]:
    draw = random.Random(stage.options.seed)
    return [
        one
        for name in stage.options.models
        for number in range(stage.each)
        for one in stage.clients(name, 1, f"predict/{name}{number}", number, sms=draw.choice(_LIMITS))
    ]


def measure(stage: Stage) -> Finding:
    """All architectures in bursts, tenants with limits of different sizes."""
    clients = _clients(stage)
    seconds = stage.options.seconds
    most = stage.drive([Traffic(one, depth=2) for one in clients], 0.4 * seconds).throughput()
    traffics = [Traffic(one, rate=_LOAD * most / len(clients)) for one in clients]
    stage.settle(traffics)
    with torch_mux.trace() as timeline:
        run = stage.drive(traffics, _LENGTH * seconds, _SHOWN * seconds, process="bursty")
    spans = timeline.spans
    lead = min((span.issued for span in spans), default=0.0) + run.window.lead
    pairs = {**replay(spans, stage.options.seed, lead), "median of their like": scattered(spans, lead)}
    data: dict[str, Any] = {
        name: {"within %": _within(found), "bundles": len(found), "pairs": found[:2000]}
        for name, found in pairs.items()
    }
    data |= {"compositions": len(set(compositions(spans))), "run": run.data()}

    def row(name: str, kind: str, bound: float | None = None) -> Row:
        return Row(name, _within(pairs.get(kind, ())), bound, False, "%")

    rows = (
        row("predicted within 10 %, held out", "held out", 99.0),
        row("predicted within 10 %, seen before", "seen"),
        row("predicted within 10 %, with the device to themselves", "by themselves"),
        row("within 10 % of the median of their like", "median of their like"),
    )
    return Finding(rows, data)

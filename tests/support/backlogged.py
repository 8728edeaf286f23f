"""What a policy promises: by weight, while everybody has something pending. From a timeline of bundles."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

from torch_mux.runtime.timeline import BundleSpan

__all__ = ["contended", "hold_to_the_bound", "longest_stretch", "served"]


def longest_stretch(spans: Sequence[BundleSpan], tenants: Sequence[str]) -> list[BundleSpan]:
    """The longest run of bundles, by device seconds, at whose issue all of these had something pending."""
    ordered = sorted(spans, key=lambda span: span.issued)
    waits: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for span in ordered:
        for request in span.requests:
            waits[request.tenant].append((request.arrival, span.issued))
    best: list[BundleSpan] = []
    run: list[BundleSpan] = []
    for span in ordered:
        pending = all(any(begin <= span.issued <= end for begin, end in waits[name]) for name in tenants)
        run = [*run, span] if pending else []
        if sum(one.seconds for one in run) > sum(one.seconds for one in best):
            best = run
    return best


def contended(spans: Sequence[BundleSpan], tenants: Iterable[str]) -> list[BundleSpan]:
    """Only what went out while everybody waited is judged: others may use the host and the device, too.

    At first nobody knows how long bundles take, and charges are off.
    """
    begun = min((span.issued for span in spans), default=0.0)
    return longest_stretch([span for span in list(spans) if span.issued > begun + 0.3], list(tenants))


def served(spans: Sequence[BundleSpan]) -> Counter[str]:
    """Device seconds by tenant; the slots of a bundle cost the same."""
    found: Counter[str] = Counter()
    for span in spans:
        for request in span.requests:
            found[request.tenant] += span.seconds / len(span.requests)  # type: ignore[assignment]
    return found


def hold_to_the_bound(spans: Sequence[BundleSpan], weights: Mapping[str, float], flying: int) -> None:
    """That no two services over weight are further apart than ``FairPolicy`` says.

    Forecasts are medians, so a bundle is off by less than the longest takes.

    Args:
        flying: bundles under way at once.
    """
    got = served(spans)
    longest = max(span.seconds for span in spans)
    usual: dict[str, float] = {}
    for program in {span.program for span in spans}:
        times = sorted(span.seconds for span in spans if span.program == program)
        usual[program] = times[len(times) // 2]
    off = flying * max(abs(span.seconds - usual[span.program]) for span in spans)
    least = min(weights.values())
    slots = {
        name: max(span.seconds / len(span.requests) for span in spans if _has(span, name)) for name in weights
    }
    bound = {name: (longest + slots[name]) / weight + off / least for name, weight in weights.items()}
    for f, g in combinations(weights, 2):
        apart = abs(got[f] / weights[f] - got[g] / weights[g])
        assert apart <= bound[f] + bound[g], (f, g, apart, bound, dict(got))


def _has(span: BundleSpan, tenant: str) -> bool:
    return any(request.tenant == tenant for request in span.requests)

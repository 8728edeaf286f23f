"""Prometheus metrics of this process; needs the extra ``metrics``.

``torch_mux.metrics.serve(9400)`` answers scrapes over HTTP, ``torch_mux.metrics.register()`` adds the metrics
to a registry that the program serves by other means. Nothing is counted twice: a scrape reads what
``stats()`` and ``explain()`` read, so requests pay nothing for it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import REGISTRY, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from torch_mux.condition import condition
from torch_mux.report import Explanation, Stats, explanation, statistics
from torch_mux.state import settings

if TYPE_CHECKING:
    from torch_mux.runtime.accounting import TenantStats

__all__ = ["MuxCollector", "register", "serve"]

_OUTCOMES: Final = ("ok", "late", "expired", "cancelled", "errors")
_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64)


class MuxCollector(Collector):
    """Reads the runtime at every scrape; safe from any thread.

    ``torch_mux_effective_share`` and ``torch_mux_granted_share`` speak of the time since the scrape before:
    which part of the device seconds a tenant got, and which its reserve and weight gave it among those that
    got any.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._before: Mapping[str, float] = {}

    def collect(self) -> Iterator[Metric]:
        """All metrics, as prometheus_client asks for them."""
        found = statistics()
        yield from _of_tenants(found)
        yield from self._shares(found)
        yield _bundles(found)
        status = condition().status
        yield _family(
            GaugeMetricFamily,
            "healthy",
            "1: serves; 0.5: all but some tenants or models; 0: serves nothing more.",
            [([], {"ok": 1.0, "degraded": 0.5}.get(status, 0.0))],
        )
        yield from _of_programs(explanation())

    def _shares(self, found: Stats) -> Iterator[Metric]:
        seconds = {name: got.device_seconds for name, got in found.tenants.items()}
        with self._lock:
            before, self._before = self._before, seconds
        used = {name: now - before.get(name, 0.0) for name, now in seconds.items()}
        active = {name for name, value in used.items() if value > 0.0}
        whole = sum(used[name] for name in active)
        granted_now = _granted({name: found.tenants[name] for name in active})
        effective = GaugeMetricFamily(
            "torch_mux_effective_share",
            "Part of the device seconds since the scrape before.",
            labels=["tenant"],
        )
        about = "Part that reserve and weight give among active tenants."
        granted = GaugeMetricFamily("torch_mux_granted_share", about, labels=["tenant"])
        for name in seconds:
            effective.add_metric([name], used[name] / whole if name in active else 0.0)
            granted.add_metric([name], granted_now.get(name, 0.0))
        yield effective
        yield granted


def _granted(active: Mapping[str, TenantStats]) -> dict[str, float]:
    """Reserves first, and what they leave by weight; where there is nobody else, all of it by reserve."""
    isolated = settings().isolation != "off"
    reserves = {name: got.reserve for name, got in active.items() if isolated and got.reserve > 0.0}
    weights = {name: got.weight for name, got in active.items() if name not in reserves}
    kept, whole = sum(reserves.values()), sum(weights.values())
    # Tenants that were active one after another may have had more than 1 in sum.
    scale = 1.0 / kept if kept > 1.0 or (kept and not weights) else 1.0
    parts = {name: reserve * scale for name, reserve in reserves.items()}
    left = max(0.0, 1.0 - kept)
    return parts | {name: left * weight / whole for name, weight in weights.items()}


_Rows = Iterable[tuple[list[str], float]]


def _family(kind: type[Any], name: str, about: str, rows: _Rows, *labels: str) -> Any:
    family = kind(f"torch_mux_{name}", about, labels=list(labels))
    for values, number in rows:
        family.add_metric(values, number)
    return family


def _of_tenants(found: Stats) -> Iterator[Metric]:
    tenants = sorted(found.tenants.items())
    both = [((name, model), part) for name, got in tenants for model, part in sorted(got.models.items())]
    yield _family(
        CounterMetricFamily,
        "requests",
        "Requests that ended, by outcome.",
        (([*key, how], getattr(part, how)) for key, part in both for how in _OUTCOMES),
        "tenant",
        "model",
        "outcome",
    )
    for attribute, about in (
        ("queue_seconds", "Seconds that requests were queued."),
        ("device_seconds", "Device seconds, in bundles by work."),
    ):
        rows: _Rows = ((list(key), getattr(part, attribute)) for key, part in both)
        yield _family(CounterMetricFamily, attribute, about, rows, "tenant", "model")
    plain: tuple[tuple[type[Any], str, str, str], ...] = (
        (CounterMetricFamily, "accepted_requests", "accepted", "Requests that were accepted."),
        (CounterMetricFamily, "refused_requests", "refused", "Requests that a limit of the quota refused."),
        (GaugeMetricFamily, "pending_requests", "pending", "Requests that are queued or under way."),
        (GaugeMetricFamily, "held_bytes", "held", "Bytes held for the tenant."),
        (GaugeMetricFamily, "coalesced_ratio", "coalesced_share", "Part that shared a bundle."),
    )
    for kind, name, attribute, about in plain:
        values = [([tenant], getattr(got, attribute)) for tenant, got in tenants]
        yield _family(kind, name, about, ((labels, n) for labels, n in values if n is not None), "tenant")
    quantiles = (
        ([name, q], value) for name, got in tenants for q, value in (("0.5", got.p50), ("0.99", got.p99))
    )
    yield _family(
        GaugeMetricFamily,
        "latency_seconds",
        "Latency of the last 2,048 requests that ended well.",
        ((labels, value) for labels, value in quantiles if value is not None),
        "tenant",
        "quantile",
    )


def _bundles(found: Stats) -> Metric:
    family = HistogramMetricFamily("torch_mux_bundle_slots", "Requests of a bundle.")
    below = [
        (str(float(most)), sum(n for size, n in found.sizes.items() if size <= most)) for most in _BUCKETS
    ]
    family.add_metric([], [*below, ("+Inf", found.bundles)], found.requests)
    return family


def _of_programs(said: Explanation) -> Iterator[Metric]:
    programs = [([one.name, one.fingerprint[:12]], one) for one in said.programs]
    labels = ("model", "program")
    yield _family(
        CounterMetricFamily,
        "model_bundles",
        "Bundles that went out.",
        ((key, sum(one.bundles.values())) for key, one in programs),
        *labels,
    )
    yield _family(
        CounterMetricFamily,
        "model_requests",
        "Requests in them.",
        ((key, sum(slots * n for slots, n in one.bundles.items())) for key, one in programs),
        *labels,
    )
    gauges: tuple[tuple[str, str, Any], ...] = (
        ("model_instances", "Models with weights of their own.", lambda one: one.instances),
        ("model_bytes", "Bytes held beyond their weights.", lambda one: one.nbytes),
        ("model_captures", "Bundle sizes captured as CUDA graphs.", lambda one: sum(map(len, one.captured))),
        (
            "model_capture_failures",
            "Sizes that could not be captured.",
            lambda one: len(one.capture_failures),
        ),
        ("model_fallback_operations", "Operations that run per instance.", lambda one: one.alone),
        ("model_compile_seconds", "Seconds that its plan took to make.", lambda one: one.compile_seconds),
        ("model_plan_from_disk", "Whether its plan was found on disk.", lambda one: float(one.from_disk)),
    )
    for name, about, value in gauges:
        rows = ((key, value(one)) for key, one in programs)
        yield _family(GaugeMetricFamily, name, about, rows, *labels)


def register(registry: CollectorRegistry = REGISTRY) -> MuxCollector:
    """Adds the metrics to a registry; ``registry.unregister(...)`` what this returns takes them out again."""
    collector = MuxCollector()
    registry.register(collector)
    return collector


def serve(port: int, address: str = "127.0.0.1") -> tuple[Any, threading.Thread]:
    """Answers scrapes at ``http://address:port/metrics`` from a daemon thread.

    Returns:
        (server, thread): ``server.shutdown()`` ends it.

    Raises:
        OSError: the port is taken.
    """
    registry = CollectorRegistry()
    register(registry)
    server, thread = start_http_server(port, address, registry)
    return server, thread

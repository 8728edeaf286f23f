"""What ``torch-mux trace`` and ``torch-mux top`` do."""

from __future__ import annotations

import runpy
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

__all__ = ["Reading", "read", "run_script", "table", "watch"]

_TIMEOUT = 5.0
_ENDED = ("ok", "late")


def run_script(script: str, arguments: Sequence[str]) -> None:
    """Runs a program as ``python script arguments`` would, in this process.

    Raises:
        SystemExit: the program asked for it, or there is no such file.
    """
    if not Path(script).is_file():
        sys.exit(f"torch-mux: there is no program {script}")
    before = sys.argv, sys.path[:]
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        sys.argv, sys.path[:] = before


@dataclass(frozen=True)
class Reading:
    """One scrape.

    Attributes:
        when: seconds on this process's clock.
        values: the sum of the samples over models, by (name, tenant, outcome or quantile).
    """

    when: float
    values: dict[tuple[str, str, str], float] = field(default_factory=dict)

    @property
    def tenants(self) -> list[str]:
        """Everybody the samples speak of."""
        return sorted({tenant for _, tenant, _ in self.values if tenant})

    def of(self, name: str, tenant: str = "", other: str = "") -> float:
        """The value of ``torch_mux_<name>``; 0 where there is none."""
        return self.values.get((f"torch_mux_{name}", tenant, other), 0.0)

    def ended(self, tenant: str) -> float:
        """Requests that were served so far."""
        return sum(self.of("requests_total", tenant, how) for how in _ENDED)


def read(url: str) -> Reading:
    """Scrapes metrics.

    Raises:
        OSError: nobody answers there.
    """
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
        text = answer.read().decode()
    values: dict[tuple[str, str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            other = sample.labels.get("outcome") or sample.labels.get("quantile") or ""
            key = (sample.name, sample.labels.get("tenant", ""), other)
            values[key] = values.get(key, 0.0) + sample.value
    return Reading(time.perf_counter(), values)


_COLUMNS = (
    "tenant",
    "req/s",
    "p50 ms",
    "p99 ms",
    "share",
    "granted",
    "queued",
    "late",
    "failed",
    "coalesced",
)


def table(before: Reading, now: Reading) -> Group:
    """Rates between two readings, one line a tenant, the busiest first."""
    seconds = max(now.when - before.when, 1e-9)
    shown = Table(box=None, pad_edge=False)
    for name in _COLUMNS:
        shown.add_column(name, justify="left" if name == "tenant" else "right")
    rates = {tenant: (now.ended(tenant) - before.ended(tenant)) / seconds for tenant in now.tenants}
    used = {t: now.of("device_seconds_total", t) - before.of("device_seconds_total", t) for t in now.tenants}
    whole = sum(used.values()) or 1.0
    for tenant in sorted(now.tenants, key=lambda one: (-rates[one], one)):
        failed = sum(now.of("requests_total", tenant, how) for how in ("errors", "expired"))
        failed += now.of("refused_requests_total", tenant)
        shown.add_row(
            tenant,
            f"{rates[tenant]:.0f}",
            f"{now.of('latency_seconds', tenant, '0.5') * 1e3:.2f}",
            f"{now.of('latency_seconds', tenant, '0.99') * 1e3:.2f}",
            f"{used[tenant] / whole:.1%}",
            f"{now.of('granted_share', tenant):.1%}",
            f"{now.of('pending_requests', tenant):.0f}",
            f"{now.of('requests_total', tenant, 'late'):.0f}",
            f"{failed:.0f}",
            f"{now.of('coalesced_ratio', tenant):.0%}",
        )
    bundles = now.of("bundle_slots_count") - before.of("bundle_slots_count")
    carried = now.of("bundle_slots_sum") - before.of("bundle_slots_sum")
    mean = f", {carried / bundles:.1f} requests each" if bundles > 0 else ""
    busy = sum(used.values()) / seconds
    head = f"{sum(rates.values()):.0f} requests/s, {bundles / seconds:.0f} bundles/s{mean}"
    return Group(Text(f"{head}, device {busy:.0%} busy"), shown)


def watch(url: str, every: float, times: int, console: Console | None = None) -> None:
    """Shows the table until it is interrupted, or ``times`` times.

    Raises:
        SystemExit: nobody answers at ``url``.
    """
    try:
        before = read(url)
        with Live(console=console or Console(), auto_refresh=False) as live:
            shown = 0
            while times == 0 or shown < times:
                time.sleep(every)
                now = read(url)
                live.update(table(before, now), refresh=True)
                before, shown = now, shown + 1
    except KeyboardInterrupt:
        return
    except (OSError, urllib.error.URLError) as error:
        sys.exit(
            f"torch-mux: nobody answers at {url} ({error}); torch_mux.metrics.serve(9400) in the program does"
        )

"""The results of ``bench models`` as plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch_mux.bench import measure

__all__ = ["table"]

HEADER = (
    *("model", "tenants", "contender", "pipelined µs", "(min-max)", "synchronised µs", "(min-max)"),
    *("l2 error", "kernels", "extra MiB/tenant"),
)


def table(report: dict[str, Any]) -> str:
    """The results as plain text, one line a model, tenant count and contender; one that failed says why."""
    lines = sorted(report["results"], key=lambda record: (record["model"], record["tenants"]))
    rows = [HEADER, *map(_cells, lines)]
    facts = report["environment"]
    title = f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, commit {facts['commit']}"
    failed = dict.fromkeys(
        f"{record['model']}: {record['contender']} failed: {record['failed']}"
        for record in lines
        if "failed" in record
    )
    return "\n".join([title, *measure.aligned(rows), *failed, *_measures(report.get("measures", ()))])


def _measures(entries: Sequence[dict[str, Any]]) -> list[str]:
    """A line a measure."""
    lines = []
    for entry in entries:
        rest = {key: value for key, value in entry.items() if key not in ("model", "measure", "tenants")}
        words = f"failed: {rest['failed']}" if "failed" in rest else _flat(rest)
        lines.append(f"{entry['model']}, {entry['measure']}: {words}")
    return lines


def _flat(value: Any) -> str:
    """Nested plain data in one line."""
    if isinstance(value, dict) and value.keys() == {"median", "low", "high"}:
        return f"{value['median']:.0f}"
    if isinstance(value, dict):
        return ", ".join(
            f"{key} ({_flat(each)})" if isinstance(each, dict) else f"{key} {_flat(each)}"
            for key, each in value.items()
        )
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return f"{len(value)}"  # records of their own: the JSON has them
    if isinstance(value, (list, tuple)):
        return "; ".join(map(_flat, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cells(record: dict[str, Any]) -> tuple[str, ...]:
    name = (record["model"], str(record["tenants"]), record["contender"])
    if "failed" in record:
        return (*name, "failed", *["-"] * (len(HEADER) - len(name) - 1))
    launched = record["launches"]
    extra = record["memory"]["extra"]["allocated"] / record["memory"]["tenants"] / 2**20
    times = (_spread(record.get(kind)) for kind in ("pipelined_us", "synchronised_us"))
    return (
        *name,
        *(cell for pair in times for cell in pair),
        f"{record['error']['mean']:.2e}",
        "-" if launched is None else str(launched["kernels"]),
        f"{extra:.1f}",
    )


def _spread(found: dict[str, float] | None) -> tuple[str, str]:
    if found is None:  # not timed yet
        return "-", "-"
    return f"{found['median']:.0f}", f"({found['low']:.0f}-{found['high']:.0f})"

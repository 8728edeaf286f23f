"""The zoo's record as text and as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch_mux.bench.measure import aligned

__all__ = ["inaccurate", "markdown", "table"]

_HEADER = (
    *("model", "eager", "Inductor", "mux", "bits", "FLOPs together", "launches", "(Inductor)"),
    *("compile s", "(Inductor)", "KiB more", "path", "not coalesced"),
)
#: A relative error above Inductor's by more than this is worth a look; below _NOISE none is.
_TOLERANCE = 1.1
_NOISE = 1e-6


def inaccurate(row: dict[str, Any]) -> bool:
    """Whether mux's mean error is more than 10 % above both peers' and above float32's noise."""
    if "mux" not in row:
        return False
    peers = [row[peer]["mean"] for peer in ("eager", "inductor") if peer in row]
    return bool(peers) and row["mux"]["mean"] > max(_NOISE, _TOLERANCE * max(peers))


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    coalesced, bits = row.get("coalesced"), row.get("same_bits")
    return (
        row["model"],
        *(_error(row, key) for key in ("eager", "inductor", "mux")),
        {None: "-", True: "same", False: "DIFFER"}[bits],
        "-" if coalesced is None else f"{coalesced:.1%}",
        _launches(row.get("launches")),
        _launches(row.get("inductor_launches")),
        _seconds(row.get("compile_seconds")),
        _seconds(row.get("inductor_seconds")),
        _memory(row.get("memory")),
        row.get("path", "-"),
        _why(row),
    )


def _error(row: dict[str, Any], key: str) -> str:
    if key not in row:
        return "-"
    return f"{row[key]['mean']:.1e}" + ("!" if key == "mux" and inaccurate(row) else "")


def _launches(found: dict[str, int] | None) -> str:
    return "-" if found is None else str(found["kernels"])


def _seconds(found: float | None) -> str:
    return "-" if found is None else f"{found:.1f}"


def _memory(found: dict[str, int | None] | None) -> str:
    if found is None:
        return "-"
    device = found["device"]
    return f"{(found['held'] or 0 if device is None else device) / 1024:.0f}"


def _why(row: dict[str, Any]) -> str:
    """Errors first, then the operations that run per instance, then notes of the face."""
    words = [f"{step} FAILED: {error}" for step, error in row["errors"].items()]
    targets: Counter[str] = Counter()
    for reason in row.get("reasons", ()):
        known = reason["kind"] == "NO_RULE"
        targets[reason["target"] if known else f"{reason['kind']} {reason['target']}"] += reason["count"]
    words += [f"{count} {target}" for target, count in targets.most_common()]
    words += [f"{note['kind']}: {note['detail']}" for note in row.get("notes", ())]
    return "; ".join(word.replace("\n", " ")[:120] for word in words)


def _title(report: dict[str, Any]) -> str:
    facts, options = report["environment"], report["options"]
    commits = dict.fromkeys(str(row.get("commit", facts["commit"]))[:12] for row in report["results"])
    return (
        f"{facts['device']}, {options['dtype']}, torch {facts['torch']}, triton {facts['triton']}, "
        f"commit {' and '.join(commits) or facts['commit']}"
        + (", shared compile caches" if options.get("share_caches") else "")
    )


def _summary(report: dict[str, Any]) -> str:
    rows: Sequence[dict[str, Any]] = report["results"]
    shares = [row["coalesced"] for row in rows if row.get("coalesced") is not None]
    load = max((row.get("load", 0.0) for row in rows), default=0.0)
    cores = report["environment"].get("cores")
    busy = f"; compile times are of a machine with a load of {load:.0f} on {cores} cores" if load else ""
    return (
        f"{len(rows)} architectures: {sum(not row['errors'] for row in rows)} ran, "
        f"{sum(share > 0.99 for share in shares)} with at least 99 % of their FLOPs together, "
        f"{sum('mux' in row and not inaccurate(row) for row in rows)} as accurate as the peers, "
        f"{sum(row.get('same_bits') is False for row in rows)} with other bits alone than together, "
        f"{sum(row.get('path') == 'learned' for row in rows)} on the learned path{busy}"
    )


def table(report: dict[str, Any]) -> str:
    """One line an architecture: errors against float64, what coalesces, its cost, and why the rest does not.

    ``!`` marks an error that is more than 10 % above both peers'.
    """
    rows = [_HEADER, *map(_cells, report["results"])]
    return "\n".join([_title(report), *aligned(rows), _summary(report)])


def markdown(report: dict[str, Any]) -> str:
    """The same table as Markdown, with the command that made it."""
    rows = [_HEADER, tuple("---" for _ in _HEADER), *map(_cells, report["results"])]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    made = f"Made by `{report['environment']['command']}`"
    return "\n".join([*lines, "", f"{_summary(report)}.", "", f"{_title(report)}. {made}.", ""])

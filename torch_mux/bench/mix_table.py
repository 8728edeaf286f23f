"""What a record of ``torch_mux.bench.mix`` says, as plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch_mux.bench import measure
from torch_mux.bench.mix_contenders import JOINED, OURS, OWN, name_of
from torch_mux.bench.mix_rows import ROWS

__all__ = ["predicted", "table", "verdicts"]

Record = dict[str, Any]
HEADER = (
    *(
        "row",
        "tenants",
        "contender",
        "pipelined µs",
        "(min-max)",
        "synchronised µs",
        "predicted",
        "vs forked",
    ),
    *("vs own", "l2 error", "kernels", "joint", "overlap"),
)


def table(report: Record) -> str:
    """The results as plain text, with how many times faster than forked branches and than own plans."""
    facts = report["environment"]
    lines = [f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, commit {facts['commit']}"]
    rows = [HEADER, *(_cells(record, report["results"]) for record in report["results"])]
    lines += measure.aligned(rows)
    lines += [
        f"{record['row']}: {record['contender']} {word}: {record[word]}"
        for record in report["results"]
        for word in ("failed", "skipped")
        if word in record
    ]
    if report["options"]["device"].startswith("cuda"):
        lines += verdicts(report["results"])
    for record in report["results"]:
        mixes = record.get("notes", {}).get("mixes", ())
        lines += [f"{record['row']}: {mix['measured']}" for mix in mixes if mix["measured"]]
    return "\n".join(lines)


def predicted(record: Record) -> str:
    """What the cost model says of the largest mix's plan, without the code between its launches."""
    mixes = [mix for mix in record.get("notes", {}).get("mixes", ()) if mix["words"] and mix["joint"]]
    largest = max(mixes, key=lambda mix: sum(slots for _, slots in mix["members"]), default=None)
    return "-" if largest is None else f"{largest['seconds'] * 1e6:.0f}"


def _cells(record: Record, results: Sequence[Record]) -> tuple[str, ...]:
    name = (record["row"], str(record["tenants"]), record["contender"])
    if "pipelined_us" not in record:
        state = next((word for word in ("failed", "skipped") if word in record), "-")
        return (*name, state, *["-"] * (len(HEADER) - len(name) - 1))
    piped, waited = record["pipelined_us"], record["synchronised_us"]
    found = record["kernels"]
    counts = ["-"] * 3
    if found is not None:
        counts = [str(found["kernels"]), str(found["of several programs"]), f"{found['overlap']:.2f}"]
    return (
        *name,
        f"{piped['median']:.0f}",
        f"({piped['low']:.0f}-{piped['high']:.0f})",
        f"{waited['median']:.0f}",
        predicted(record),
        _times(record, results, ["forked"]),
        _times(record, results, OWN),
        f"{record['error']['mean']:.2e}",
        *counts,
    )


def _medians(results: Sequence[Record], row: str, keys: Sequence[str]) -> dict[str, float]:
    """Microseconds of a pipelined round of those of a row's contenders that were timed, by name."""
    names = set(map(name_of, keys))
    return {
        other["contender"]: other["pipelined_us"]["median"]
        for other in results
        if other["row"] == row and other["contender"] in names and "pipelined_us" in other
    }


def _times(record: Record, results: Sequence[Record], keys: Sequence[str]) -> str:
    """How many times faster than the best of these in its row."""
    peers = _medians(results, record["row"], keys)
    return f"{min(peers.values()) / record['pipelined_us']['median']:.2f}" if peers else "-"


def verdicts(results: Sequence[Record]) -> list[str]:
    """Each row's targets: the fastest of ours against its peers, and joint launches against our own plans."""
    lines = []
    for name in dict.fromkeys(record["row"] for record in results):
        row = ROWS[name]
        if row.peers is not None:
            lines += _verdict(results, name, OURS, *row.peers)
        if row.own is not None:
            lines += _verdict(results, name, JOINED, OWN, row.own)
    return lines


def _verdict(
    results: Sequence[Record], row: str, ours: Sequence[str], peers: Sequence[str], least: float
) -> list[str]:
    found, others = _medians(results, row, ours), _medians(results, row, peers)
    if not found or not others:
        return []
    best, peer = min(found, key=found.__getitem__), min(others, key=others.__getitem__)
    times = others[peer] / found[best]
    word = "pass" if times >= least else "MISS"
    return [f"{row}: {best} is {times:.2f} times as fast as {peer} (>= {least}: {word})"]

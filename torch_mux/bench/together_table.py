"""What a record of ``torch_mux.bench.together`` says: a line a layer, and geometric means over layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from torch_mux.bench.measure import aligned
from torch_mux.bench.paper import geometric_mean

__all__ = ["TARGETS", "line", "ratios", "table"]

#: Times faster than the faster of the serial ways, as a geometric mean over layers.
TARGETS: Final = {"together": 2.6, "coalesced": 4.0}
_KINDS: Final = ("serial", "together", "coalesced")
Result = Mapping[str, Any]


def medians(result: Result) -> dict[str, float]:
    """Microseconds of a round of each way that was measured."""
    return {
        row["contender"]: row["microseconds"]["median"] for row in result["rows"] if "microseconds" in row
    }


def best(result: Result) -> dict[str, tuple[float, str]]:
    """(microseconds, way) of the fastest of each kind."""
    times = medians(result)
    found: dict[str, tuple[float, str]] = {}
    for row in result["rows"]:
        name, kind = row["contender"], row["kind"]
        if name in times:
            found[kind] = min(found.get(kind, (times[name], name)), (times[name], name))
    return found


def ratios(results: Iterable[Result], over: Callable[[Result], float | None], under: str) -> list[float]:
    """How many times faster a way, or the best of a kind, is than what ``over`` says; of layers with both."""
    found = []
    for result in results:
        times = {**medians(result), **{kind: pair[0] for kind, pair in best(result).items()}}
        base = over(result)
        if base is not None and under in times:
            found.append(base / times[under])
    return found


def _fastest(kind: str) -> Callable[[Result], float | None]:
    return lambda result: best(result)[kind][0] if kind in best(result) else None


def _way(name: str) -> Callable[[Result], float | None]:
    return lambda result: medians(result).get(name)


def line(result: Result) -> str:
    """One layer."""
    layer = result["layer"]
    title = f"{layer['model']:9s} {layer['name']:24s} x{result['slots']:<3d}"
    if "skipped" in result:
        return f"{title}skipped: {result['skipped']}"
    failed = [f"{row['contender']} FAILED: {row['error']}" for row in result["rows"] if "error" in row]
    times = [f"{name} {micro:.1f}" for name, micro in medians(result).items()]
    return title + "  ".join([*times, *failed])


def table(report: Mapping[str, Any]) -> str:
    """Geometric means by model and number of instances, targets and verdicts; below what is missing."""
    facts, results = report["environment"], report["results"]
    lines = [f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, commit {facts['commit']}"]
    gpu = not report["options"]["device"].startswith("cpu")
    if not gpu:
        lines.append("on a CPU: small layers through the vendor's kernels; no target is set for it")
    counts = list(dict.fromkeys(result["slots"] for result in results))
    models = list(dict.fromkeys(result["layer"]["model"] for result in results))
    header = ("instances", "layers of", "measured", *(f"{kind} vs serial" for kind in TARGETS))
    rows: list[Sequence[str]] = [header]
    for count in counts:
        for model in (*models, "all"):
            own = [
                result
                for result in results
                if result["slots"] == count and model in ("all", result["layer"]["model"])
            ]
            done = sum(set(_KINDS) <= set(best(result)) for result in own)
            cells = [_cell(own, kind, gpu and model == "all") for kind in TARGETS]
            rows.append((str(count), model, f"{done} of {len(own)}", *cells))
    lines += aligned(rows)
    for count in counts:
        lines += _details(count, [result for result in results if result["slots"] == count])
    lines += [line(result) for result in results if any("error" in row for row in result["rows"])]
    return "\n".join([*lines, *_skipped(results)])


def _cell(results: Sequence[Result], kind: str, verdict: bool) -> str:
    found = ratios(results, _fastest("serial"), kind)
    if not found:
        return "-"
    mean = geometric_mean(found)
    words = f"{mean:.2f}x"
    return (
        words + f" (>= {TARGETS[kind]}: {'pass' if mean >= TARGETS[kind] else 'MISS'})" if verdict else words
    )


def _details(count: int, results: Sequence[Result]) -> list[str]:
    """Every way against each of the serial ones."""
    kinds = {row["contender"]: row["kind"] for result in results for row in result["rows"]}
    lines = []
    for base in (name for name, kind in kinds.items() if kind == "serial"):
        means = {name: ratios(results, _way(base), name) for name in kinds if name != base}
        cells = "; ".join(f"{name} {geometric_mean(found):.2f}" for name, found in means.items() if found)
        lines.append(f"{count} instances, times faster than {base}: {cells}")
    return lines


def _skipped(results: Sequence[Result]) -> list[str]:
    reasons: dict[str, int] = {}
    for result in results:
        if "skipped" in result:
            reasons[result["skipped"]] = reasons.get(result["skipped"], 0) + 1
    return [f"{count} of {len(results)} not measured: {reason}" for reason, count in reasons.items()]

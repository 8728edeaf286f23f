"""Makes the chooser's measured table: ``python -m torch_mux.bench.table kernels-h100.json MORE.json``.

Reads what ``python -m torch_mux.bench.kernels --json`` wrote, in the order that the design page names, writes
the table that :mod:`torch_mux.lowering.kernels.choose` looks into, fits the constants of the analytic model
again (:mod:`torch_mux.lowering.kernels.estimate`) and prints how far the chooser is from the best tiles: with
the table, without it and, on demand, with each shape left out of the fit as well.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_mux.bench import measure
from torch_mux.bench.layers import Layer
from torch_mux.lowering.kernels import choose, measured
from torch_mux.lowering.kernels.data import BitClass, Tile, family_of
from torch_mux.lowering.kernels.estimate import RATES, Rates, kind_of, seconds

__all__ = ["Measurement", "fit", "main", "own_class", "read", "table_of"]

HALF = torch.float16
#: What is fitted of each kind of launch; the rest of a convolution that gathers is that of its family.
FITTED = {
    "wgmma": ("start", "latency", "begin", "load", "store", "memory", "line"),
    "mma": ("start", "latency", "begin", "load", "store", "memory", "line"),
    "wgmma gather": ("latency", "address"),
    "wgmma narrow": ("latency", "address"),
    "mma gather": ("latency", "address"),
    "mma narrow": ("latency", "address"),
}
PRIOR = 0.02  # what moving a constant by e times costs, in the error of one measurement
ROBUST = 0.1  # relative errors beyond this count linearly
#: Where a fit starts that must know nothing of what it is to predict.
ROUGH = Rates(
    start=1e-6, latency=0.3e-6, begin=1e-6, load=100e9, store=20e-12, memory=4e12, line=0.1e-9, flops=4e12,
    address=100e-12,
)  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """The microseconds of every tile of the class that the chooser puts one layer into."""

    layer: Layer
    slots: int
    microseconds: dict[Tile, float]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(m, n, k) of every slot."""
        return self.layer.m, self.layer.n, self.layer.k

    @property
    def channels(self) -> list[int] | None:
        """Input channels of every slot of a convolution."""
        return None if self.layer.channels is None else [self.layer.channels] * self.slots

    def kind(self, tile: Tile) -> str:
        """What the model's constants go by."""
        own = own_class(self.layer)
        return kind_of(family_of(tile, own.swap), own.gather, self.channels)

    @property
    def best(self) -> float:
        """Microseconds of the fastest tile."""
        return min(self.microseconds.values())

    def tiles(self) -> list[Tile]:
        """The measured tiles that the chooser may take."""
        own, channels = own_class(self.layer), self.layer.channels
        narrow = own.gather and channels is not None and channels % 4 != 0
        allowed = choose.candidates(own, HALF, narrow, channels is None)
        return [tile for tile in self.microseconds if tile in allowed]

    def expected(self, tile: Tile, rates: Rates, sms: int) -> float:
        """Microseconds according to the model."""
        sizes, own = [self.shape] * self.slots, own_class(self.layer)
        return seconds(sizes, tile, HALF, own, sms, self.channels, rates) * 1e6


def own_class(layer: Layer) -> BitClass:
    """The bit class of a layer in half precision."""
    size = (layer.m, layer.n, layer.k)
    if layer.conv is None or layer.channels is None:
        return choose.linear_class([size], HALF)
    return choose.conv_class([size], [layer.channels], layer.conv[2] ** 2, HALF, False)


def merged(contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first record with what others of the same kind of device have measured since.

    They add tiles, or take the place of what was known of their layers where they say ``"replaces": true``
    because the kernel has changed. Left out are rows of what is not in the tree: of a variant of the kernel
    (``"in_tree": false``) or of a reduction that is split; both lost, see the design page.
    """
    first, *others = contents
    results = {_key(result): result for result in first["results"]}
    for content in others:
        for result in content["results"]:
            key, replaces = _key(result), content.get("replaces", False)
            if key not in results and not replaces:
                continue
            before = [] if replaces else results[key]["candidates"]
            known = [Tile(**row["tile"]) for row in before]
            new = [row for row in result["candidates"] if Tile(**row["tile"]) not in known]
            ours = [row for row in new if row["class"].get("split", 1) == 1 and row.get("in_tree", True)]
            results[key] = {**result, **results.get(key, {}), "candidates": [*before, *ours]}
    return {**first, "results": list(results.values())}


def _key(result: dict[str, Any]) -> str:
    """Of what one launch did, however often its model has it."""
    return json.dumps([{**result["layer"], "count": None}, result["slots"]])


def read(content: dict[str, Any]) -> list[Measurement]:
    """What the benchmark's JSON says of the class of every layer."""
    found = []
    for result in content["results"]:
        fields = result["layer"]
        layer = Layer(**{**fields, "conv": None if fields["conv"] is None else tuple(fields["conv"])})
        own, times = own_class(layer), {}
        for row in result["candidates"]:
            kind = row["class"]
            if BitClass(None, kind["swap"], kind["gather"], kind["precision"]) == own:
                times[Tile(**row["tile"])] = row["microseconds"]
        if times:
            found.append(Measurement(layer, result["slots"], times))
    return found


def table_of(content: dict[str, Any]) -> measured.Table:
    """The measured table: layers of one shape are averaged, geometrically."""
    groups: dict[tuple[Any, ...], list[Measurement]] = defaultdict(list)
    for each in read(content):
        groups[own_class(each.layer), each.shape, each.layer.channels, each.slots].append(each)
    entries = []
    for (own, shape, channels, slots), alike in groups.items():
        tiles = [tile for tile in alike[0].tiles() if all(tile in each.microseconds for each in alike)]
        mean = {
            tile: math.exp(sum(math.log(each.microseconds[tile]) for each in alike) / len(alike)) * 1e-6
            for tile in tiles
        }
        entries.append(measured.Entry(own, shape, channels, slots, mean))
    device = content["environment"]
    return measured.Table("sm_90", device["multiprocessors"], tuple(entries))


def _solve(residuals: Callable[[Tensor], Tensor], start: Tensor, rounds: int = 12) -> Tensor:
    """Levenberg and Marquardt's least squares with a numeric derivative."""
    at, now, damping = start, residuals(start), 1e-3
    for _ in range(rounds):
        columns = []
        for index in range(len(at)):
            moved = at.clone()
            moved[index] += 1e-4
            columns.append((residuals(moved) - now) / 1e-4)
        slope = torch.stack(columns, 1)
        square = slope.T @ slope
        step = torch.linalg.solve(square + damping * torch.diag(square.diagonal()), slope.T @ now)
        there = residuals(at - step)
        if there.square().sum() < now.square().sum():
            at, now, damping = at - step, there, damping / 5
        else:
            damping *= 10
    return at


def fit(found: Sequence[Measurement], kind: str, rates: Rates, sms: int) -> Rates:
    """The constants of one kind of launch that fit the logarithms of the times best; fast tiles weigh more.

    Args:
        kind: a key of :data:`FITTED`.
        rates: where to start, and what the constants that are not fitted are.
    """
    names = FITTED[kind]
    rows = [(each, tile) for each in found for tile in each.tiles() if each.kind(tile) == kind]
    took = torch.tensor([each.microseconds[tile] for each, tile in rows], dtype=torch.float64)
    weight = torch.tensor([each.best for each, _ in rows], dtype=torch.float64) / took
    start = torch.tensor([getattr(rates, name) for name in names], dtype=torch.float64).log()

    def of(at: Tensor) -> Rates:
        return replace(rates, **dict(zip(names, at.exp().tolist(), strict=True)))

    def residuals(at: Tensor) -> Tensor:
        now = of(at)
        expected = [each.expected(tile, now, sms) for each, tile in rows]
        error = weight * (torch.tensor(expected, dtype=torch.float64) / took).log()
        soft = error.sign() * ROBUST * (2 * ((1 + (error / ROBUST) ** 2).sqrt() - 1)).sqrt()
        return torch.cat([soft, PRIOR * (at - start)])

    return of(_solve(residuals, start))


def totals(found: Sequence[Measurement], pick: Callable[[Measurement], Tile]) -> dict[tuple[str, int], float]:
    """By model and slots: what the picked tiles take together, divided by what the best take."""
    sums: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for each in found:
        tile = pick(each)
        if tile not in each.microseconds:  # the record is older than the tile
            continue
        entry = sums[each.layer.model, each.slots]
        entry[0] += each.layer.count * each.microseconds[tile]
        entry[1] += each.layer.count * each.best
    return {key: own / best for key, (own, best) in sums.items() if best}


def chosen(each: Measurement, sms: int, table: measured.Table | None = None) -> Tile:
    """What the chooser takes, by the table that ships or by another."""
    sizes, own = [each.shape] * each.slots, own_class(each.layer)
    if each.channels is None:
        return choose.tile(sizes, HALF, own, sms, table=table)
    return choose.conv_tile(sizes, each.channels, HALF, own, sms, table=table)


def left_out(found: Sequence[Measurement], sms: int) -> dict[tuple[str, int], float]:
    """As :func:`totals` of the model alone, with every shape predicted by a fit that has not seen it."""
    fitted: dict[tuple[tuple[int, int, int], str], Rates] = {}
    for shape, kind in {(each.shape, each.kind(tile)) for each in found for tile in each.tiles()}:
        others = [each for each in found if each.shape != shape]
        rough = replace(RATES[kind], **{name: getattr(ROUGH, name) for name in FITTED[kind]})
        fitted[shape, kind] = fit(others, kind, rough, sms)

    def pick(each: Measurement) -> Tile:
        def expected(tile: Tile) -> float:
            return each.expected(tile, fitted[each.shape, each.kind(tile)], sms)

        return min(each.tiles(), key=expected)

    return totals(found, pick)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the table and prints the constants and the chooser's distance from the best tiles."""
    parser = argparse.ArgumentParser(prog="python -m torch_mux.bench.table", description=__doc__)
    parser.add_argument("json", type=Path, nargs="+", help="what the kernel benchmark wrote")
    parser.add_argument("--out", type=Path, default=Path(measured.__file__).with_name("measured.json"))
    parser.add_argument("--leave-out", action="store_true", help="fit without each shape, too: a minute")
    options = parser.parse_args(argv)
    content = merged([measure.read(parser, path) for path in options.json])
    table, found = table_of(content), read(content)
    options.out.write_text(measured.dump(table))
    for kind in FITTED:
        print(f"{kind:12s}", fit(found, kind, RATES[kind], table.multiprocessors))
    sms, empty = table.multiprocessors, replace(table, entries=())
    rows = {
        "table": totals(found, lambda each: chosen(each, sms, table)),
        "model": totals(found, lambda each: chosen(each, sms, empty)),
    }
    if options.leave_out:
        rows["left out"] = left_out(found, sms)
    for name, ratios in rows.items():
        print(f"{name:9s}", *(f"{model} T{slots} {ratio:.3f}" for (model, slots), ratio in ratios.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Times every tile of every super-kernel layer shape: ``python -m torch_mux.bench.kernels --json PATH``.

For the layers of ResNet-50, BERT-base (128 tokens), ViT-B/16 (197 tokens) and one 1 by 4096 by 4096 layer, at
several slot counts: checks each candidate against float64 and bitwise within its class and across slot
counts, times it in a CUDA graph of launches whose weights come from memory, and compares the best with what
:mod:`torch_mux.lowering.kernels.choose` picks and with the vendor's kernels one by one in a graph.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from torch_mux.bench.layer_data import HALF, MOST_SETS, Data, cold_sets, timed
from torch_mux.bench.layers import LAYERS, Layer
from torch_mux.bench.measure import announce, command, commit
from torch_mux.bench.table import own_class
from torch_mux.lowering.kernels import choose
from torch_mux.lowering.kernels.common import multiprocessors
from torch_mux.lowering.kernels.data import BitClass, Family, Tile, family_of
from torch_mux.lowering.kernels.measured import words_of

__all__ = ["main"]

CHECKED = 4  # slots compared with float64


# More bytes in flight than the candidates have: one slot alone waits for memory.
EXTRA = {
    Family.WGMMA: (
        Tile(64, 32, 128, 4, 4, 2),
        Tile(64, 16, 128, 4, 4, 2),
        Tile(64, 64, 128, 4, 4, 1),
        Tile(64, 64, 64, 4, 6, 2),
    ),
    Family.MMA: (Tile(16, 16, 256, 4, 6, 2), Tile(16, 32, 256, 4, 4, 2)),
}


def classes(layer: Layer) -> list[BitClass]:
    """The layer's own bit class first, then what else would be worth having for so few rows."""
    own = own_class(layer)
    found = [own]
    if layer.m <= 64:
        found.append(replace(own, family=Family.WGMMA, swap=True))
    return found


def chosen_tile(layer: Layer, slots: int, sms: int) -> Tile:
    """What the chooser takes for ``slots`` slots."""
    sizes = [(layer.m, layer.n, layer.k)] * slots
    if layer.channels is None:
        return choose.tile(sizes, HALF, own_class(layer), sms)
    return choose.conv_tile(sizes, [layer.channels] * slots, HALF, own_class(layer), sms)


def candidates(
    layer: Layer, bit_class: BitClass, chosen: Sequence[Tile], only: Family | None = None
) -> list[Tile]:
    """Tiles of a class to time: those of the chooser, a few more, and the chosen ones in the own class.

    Args:
        only: besides the chosen ones those that the chooser may take of these instructions.
    """
    narrow = bit_class.gather and layer.channels is not None and layer.channels % 4 != 0
    found = list(choose.candidates(bit_class, HALF, narrow, layer.channels is None))
    if not bit_class.gather and only is None:
        families = Family if bit_class.family is None else (bit_class.family,)
        extra = tuple(tile for family in families for tile in EXTRA[family])
        if bit_class.swap:
            extra = tuple(replace(each, block_m=each.block_n, block_n=each.block_m) for each in extra)
        found += [each for each in extra if each not in found]
    limit = 64 if layer.m <= 64 else 128
    side = [each for each in found if each.block_m <= max(limit, 16) and each.block_n <= max(2 * layer.n, 64)]
    side = [each for each in side if only in (None, family_of(each, bit_class.swap))]
    return list(dict.fromkeys([*side, *(chosen if bit_class == own_class(layer) else ())]))


def _warm(job: tuple[Layer, list[tuple[BitClass, Tile]]]) -> list[str]:
    """Compiles the candidates of one layer into Triton's cache; what failed, in words."""
    layer, pairs = job
    data, failed = Data(layer, 1, 1), []
    for bit_class, tile in pairs:
        try:
            data.launch(0, bit_class, tile).build()
        except Exception as error:
            failed.append(f"{layer.name} {tile}: {type(error).__name__}: {error}")
    return failed


def precompile(
    layers: Sequence[Layer], slots: Sequence[int], workers: int, only: Family | None = None
) -> list[str]:
    """Compiles every candidate in parallel processes; what failed, in words."""
    jobs, sms = [], multiprocessors(torch.device("cuda", 0))
    for layer in layers:
        chosen = [chosen_tile(layer, count, sms) for count in slots]
        pairs = [(each, tile) for each in classes(layer) for tile in candidates(layer, each, chosen, only)]
        jobs += [(layer, pairs[start : start + 4]) for start in range(0, len(pairs), 4)]
    failed: list[str] = []
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for words in pool.map(_warm, jobs):
            failed += words
    return failed


def measure(
    layer: Layer, slots: int, alone: dict[BitClass, Tensor], only: Family | None = None
) -> dict[str, Any]:
    """Checks and times every candidate of one layer at one slot count.

    Args:
        alone: results of slot 0 by class, filled by the first call and compared with by later ones.
        only: as for :func:`candidates`.
    """
    sets = cold_sets(layer, slots, MOST_SETS)
    data = Data(layer, slots, sets)
    exact = data.exact(min(slots, CHECKED))
    chosen = data.launch(0).tile
    rows = []
    for bit_class in classes(layer):
        first: Tensor | None = None
        for tile in candidates(layer, bit_class, [chosen], only):
            data.outs[0].fill_(float("nan"))
            data.launch(0, bit_class, tile).run()
            got = data.outs[0].clone()
            first = got if first is None else first
            single = alone.setdefault(bit_class, got[:1].clone())
            error = (got[:CHECKED].double() - exact).abs().max() / exact.abs().max()
            launches = [data.launch(index, bit_class, tile) for index in range(sets)]
            micro = timed(lambda index, launches=launches: launches[index].run(), sets)  # type: ignore[misc]
            rows.append(
                {
                    "tile": asdict(tile),
                    "class": asdict(bit_class),
                    "microseconds": micro,
                    "error": float(error),
                    "same_bits": bool(torch.equal(got, first) and torch.equal(got[:1], single)),
                    "chosen": bit_class == own_class(layer) and tile == chosen,
                    "grid": launches[0].grid,
                }
            )
    vendor = timed(lambda index: [data.vendor(index, slot) for slot in range(slots)], min(sets, 8))
    return {"layer": asdict(layer), "slots": slots, "vendor_microseconds": vendor, "candidates": rows}


def _short(row: dict[str, Any]) -> str:
    tile, kind = row["tile"], row["class"]
    family = family_of(Tile(**tile), kind["swap"])
    return f"{words_of(Tile(**tile))}{' swap' if kind['swap'] else ''} {family.value[:2]}"


def line(result: dict[str, Any]) -> str:
    """One row of the table."""
    layer, rows = result["layer"], result["candidates"]
    best, chosen = min(rows, key=lambda row: row["microseconds"]), next(row for row in rows if row["chosen"])
    bad = [row for row in rows if not row["same_bits"]]
    wrong = max(row["error"] for row in rows)
    note = f"  BITS DIFFER: {', '.join(map(_short, bad))}" if bad else ""
    return (
        f"{layer['model']:9s}{layer['name']:22s} T{result['slots']:<3d} best {best['microseconds']:7.1f} "
        f"[{_short(best):27s}] chosen {chosen['microseconds']:7.1f} [{_short(chosen):27s}] vendor "
        f"{result['vendor_microseconds']:7.1f}  error {wrong:.1e}{note}"
    )


def totals(results: Sequence[dict[str, Any]]) -> list[str]:
    """A line a model and slot count: the sum over its layers."""
    sums: dict[tuple[str, int], list[float]] = {}
    for result in results:
        entry = sums.setdefault((result["layer"]["model"], result["slots"]), [0.0, 0.0, 0.0])
        rows, count = result["candidates"], result["layer"]["count"]
        entry[0] += count * min(row["microseconds"] for row in rows)
        entry[1] += count * next(row["microseconds"] for row in rows if row["chosen"])
        entry[2] += count * result["vendor_microseconds"]
    return [
        f"{model:9s}all layers T{slots:<3d} best {best:8.0f} chosen {chosen:8.0f} vendor {vendor:8.0f}"
        for (model, slots), (best, chosen, vendor) in sorted(sums.items())
    ]


def environment() -> dict[str, Any]:
    """The device and the versions that the numbers belong to."""
    device = torch.cuda.get_device_properties(0)
    return {
        "device": device.name,
        "multiprocessors": device.multi_processor_count,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "command": command(sys.argv),
        "commit": commit(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 where a candidate's bits differ within its class or its error is too large."""
    parser = argparse.ArgumentParser(prog="python -m torch_mux.bench.kernels", description=__doc__)
    parser.add_argument("--json", type=Path, help="where the numbers go")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 4, 16], help="slot counts")
    parser.add_argument("--only", nargs="+", default=[""], help="layers whose model and name contain one")
    parser.add_argument("--workers", type=int, default=min(14, os.cpu_count() or 1), help="compile processes")
    parser.add_argument(
        "--family",
        type=Family,
        choices=list(Family),
        help="besides the chosen tile time only those of these instructions that may be chosen",
    )
    options = parser.parse_args(argv)
    layers = [each for each in LAYERS if any(one in f"{each.model} {each.name}" for one in options.only)]
    if not layers:
        parser.error(f"no layer contains {' or '.join(map(repr, options.only))}")
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here, and super-kernels run on one only")
    announce(torch.device("cuda"))
    torch.backends.cudnn.benchmark = True
    start = time.perf_counter()
    failed = precompile(layers, options.slots, options.workers, options.family)
    print(f"compiled in {time.perf_counter() - start:.0f} s", *failed, sep="\n")
    results = []
    for layer in layers:
        alone: dict[BitClass, Tensor] = {}
        for slots in options.slots:
            results.append(measure(layer, slots, alone, options.family))
            print(line(results[-1]), flush=True)
    print(*totals(results), f"{time.perf_counter() - start:.0f} s in all", sep="\n")
    if options.json is not None:
        content = {"environment": environment(), "failed": failed, "results": results}
        options.json.write_text(json.dumps(content, indent=1, default=str))
    rows = [row for result in results for row in result["candidates"]]
    return int(bool(failed) or any(not row["same_bits"] or not row["error"] < 2e-3 for row in rows))


if __name__ == "__main__":
    sys.exit(main())

"""Constrained kernels dispatched together: ``python -m torch_mux.bench.together --json together.json``.

"The OoO VLIW JIT Compiler for GPU Inference" (arXiv 1901.10008) found 2.6 times for kernels that are kept to
a part of the GPU and run side by side, on one shape. Here it is every distinct convolution and matrix product
of ResNet-50, ViT-B/16, BERT-base and MobileNetV3-L, each for several instances with weights of their own:

- *serial*: one kernel after another, each on the whole device; the vendor's (cuBLAS, cuDNN, with bias alone)
  and ours (with the layer's whole epilogue). What follows is compared with the faster of the two;
- *together*: our kernels on branches of one CUDA graph, kept to 1, 2 and 4 even shares of the multiprocessors
  by their grids, and not kept at all; of a layer its best counts;
- *coalesced*: one super-kernel for all instances.

Every way's results are compared with float64 first, and those of our kernels with each other bit for bit.
Times are medians over replays that take turns. Without a GPU a few small layers run through the vendor's
kernels of the CPU, kept to a core each: that tries the harness.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from torch_mux.bench import measure
from torch_mux.bench.contenders.recording import Graphs
from torch_mux.bench.layer_data import MOST_SLOTS, Data
from torch_mux.bench.layer_ways import SERIAL, CpuWays, GpuWays, Way, Ways
from torch_mux.bench.layers import DISTINCT, Layer
from torch_mux.bench.together_table import line, table
from torch_mux.lowering.kernels.code import Code

__all__ = ["Options", "main", "run", "selected"]

#: Instances that are compared with float64; the others of ours with them by their bits.
_CHECKED: Final = 4
#: Relative l2 error, by dtype.
_TOLERANCE: Final = {torch.float16: 2e-3, torch.float32: 1e-5}
#: Of the budget, what compiling may take.
_COMPILING: Final = 0.6
_SMALL: Final = 12_000_000  # FLOPs of one instance of a layer that a CPU is to run
Record = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        slots: numbers of instances.
        layers: what a layer's model and name must contain, one of these; empty for all.
        device: "cuda" or "cpu".
        replays: timed ones of each way.
        budget: seconds in all; layers that it does not reach are in the record with that reason.
    """

    slots: tuple[int, ...]
    layers: tuple[str, ...]
    device: torch.device
    replays: int
    budget: float


class WrongResults(RuntimeError):
    """A way's results are not the layer's."""


def selected(options: Options) -> list[Layer]:
    """The layers, the models taking turns: what a budget cuts off is something of each."""
    wanted = options.layers or ("",)
    found = [layer for layer in DISTINCT if any(word in f"{layer.model} {layer.name}" for word in wanted)]
    if options.device.type == "cpu":
        found = [layer for layer in found if layer.flops <= _SMALL]
    models = dict.fromkeys(layer.model for layer in found)
    groups = [[layer for layer in found if layer.model == model] for model in models]
    return [layer for turn in zip_longest(*groups) for layer in turn if layer is not None]


@contextmanager
def _maker(options: Options) -> Iterator[Callable[[Layer, int], Ways]]:
    """Makes the ways of a layer for so many instances."""
    if options.device.type == "cuda":
        graphs = Graphs()
        graphs.lanes(max(options.slots))
        yield lambda layer, count: GpuWays(layer, count, graphs, options.device)
        return
    with ThreadPoolExecutor(torch.get_num_threads(), "torch_mux-bench") as workers:
        yield lambda layer, count: CpuWays(layer, count, workers)


def _codes(
    layers: Sequence[Layer], slots: Sequence[int], device: torch.device
) -> dict[tuple[Layer, int], list[Code]]:
    """What each layer's launches run."""
    found = {}
    for layer in layers:
        for count in slots:
            data = Data(layer, count, 1, device)
            found[layer, count] = [data.launch(0, slot=0).code, data.launch(0).code]
    return found


def _build(code: Code) -> None:
    """Compiles into Triton's cache."""
    code.build()


def _late(layers: Sequence[Layer], options: Options, seconds: float) -> set[tuple[Layer, int]]:
    """Compiles all kernels in as many processes as there are cores; the layers whose are not ready in time.

    A kernel that does not compile fails again, and with its error, where it is launched.
    """
    if options.device.type == "cpu":
        return set()
    codes = _codes(layers, options.slots, options.device)
    distinct = {code.variant: code for own in codes.values() for code in own}
    workers = max(1, min(len(distinct), (os.cpu_count() or 1) - 1))
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    pending = {variant: pool.submit(_build, code) for variant, code in distinct.items()}
    wait(pending.values(), seconds)
    ready = {variant for variant, one in pending.items() if one.done()}
    pool.shutdown(wait=False, cancel_futures=True)
    _say(f"{len(ready)} of {len(distinct)} kernels compiled")
    return {place for place, own in codes.items() if not ready.issuperset(code.variant for code in own)}


def run(options: Options, save: Callable[[Record], object] = lambda report: None) -> Record:
    """Measures every layer; plain data, one entry of ``results`` a layer and number of instances.

    Args:
        save: gets the report after each layer.
    """
    begun = time.monotonic()
    report: Record = {
        "environment": measure.environment(options.device),
        "options": {**asdict(options), "device": str(options.device)},
        "results": [],
    }
    layers = selected(options)
    limit = _COMPILING * options.budget
    late = _late(layers, options, limit)
    report["compiling_seconds"] = round(time.monotonic() - begun, 1)
    _say(f"{len(layers)} layers; compiling took {report['compiling_seconds']} s")
    with torch.inference_mode(), _maker(options) as make:
        for layer in layers:
            for count in options.slots:
                result: Record = {"layer": asdict(layer), "slots": count, "rows": []}
                report["results"].append(result)
                if time.monotonic() - begun > options.budget:
                    result["skipped"] = f"the budget of {options.budget:g} s was spent"
                elif (layer, count) in late:
                    result["skipped"] = f"kernels were not compiled within {limit:g} s"
                else:
                    result["rows"] = _measured(partial(make, layer, count), options.replays)
                    _say(line(result))
            report["seconds"] = round(time.monotonic() - begun, 1)
            save(report)
    return report


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def _measured(make: Callable[[], Ways], replays: int) -> list[Record]:
    """All ways of one layer: checked, then timed in turns; one that fails is a row with its error."""
    try:
        ways = make()
    except Exception as error:
        traceback.print_exc()
        return [{"contender": "all", "kind": "all", "error": _words(error)}]
    rows: list[Record] = []
    ready: list[tuple[Way, Record]] = []
    own: Tensor | None = None
    exact = {plain: ways.data.exact(min(_CHECKED, ways.data.slots), plain) for plain in (False, True)}
    for name, kind in ways.names().items():
        row: Record = {"contender": name, "kind": kind}
        rows.append(row)
        try:
            way = ways.make(name)
            row["l2_error"] = _checked(way, exact[way.plain], own)
            if not way.plain and name in SERIAL:
                own = way.found
            ready.append((way, row))
        except Exception as error:
            traceback.print_exc()
            row["error"] = _words(error)
    for _ in range(replays):
        for way, _ in ready:
            way.microseconds.append(1e6 * ways.seconds(way.replay) / way.rounds)
    for way, row in ready:
        times = way.microseconds
        row["microseconds"] = {"median": statistics.median(times), "low": min(times), "high": max(times)}
    del ways, ready, exact, own
    gc.collect()
    return rows


def _checked(way: Way, exact: Tensor, own: Tensor | None) -> float:
    """The relative l2 error of a way's results.

    Args:
        exact: of the first instances.
        own: what our kernels found one after another, which no other way of ours may differ from.

    Raises:
        WrongResults: it is too large, or bits differ.
    """
    found = way.found[:, : len(exact)].double()
    error = float((found - exact).norm() / exact.expand_as(found).norm())
    if not error <= _TOLERANCE[way.found.dtype] or not way.found.isfinite().all():
        raise WrongResults(f"relative l2 error {error:.1e}")
    if own is not None and not way.plain and not torch.equal(way.found, own):
        raise WrongResults(f"bits differ from {SERIAL[1]}")
    return error


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}"[:500]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    cuda = torch.cuda.is_available()
    result = argparse.ArgumentParser(prog="torch-mux bench together", description=__doc__)
    result.add_argument("--device", default="cuda" if cuda else "cpu")
    result.add_argument(
        "--slots", default=None, help=f"numbers of instances up to {MOST_SLOTS}; 4,16 on a GPU"
    )
    result.add_argument("--layers", default="", help="only those whose model and name contain one of these")
    result.add_argument("--replays", type=int, default=5, help="timed replays of each way")
    result.add_argument("--budget", type=float, default=60.0, help="seconds; layers beyond it are named")
    result.add_argument("--json", type=Path, default=None, help="write the record here")
    return result


def checked(flags: argparse.ArgumentParser, arguments: argparse.Namespace) -> Options:
    """Options whose every number makes sense; else a message and exit code 2."""
    measure.require_device(flags, arguments.device)
    device = torch.device(arguments.device)
    text = arguments.slots or ("4,16" if device.type == "cuda" else "2,4")
    try:
        slots = tuple(int(word) for word in text.split(","))
    except ValueError:
        flags.error(f"--slots takes numbers with commas between them, not {text!r}")
    if not all(2 <= count <= MOST_SLOTS for count in slots):
        flags.error(f"--slots must be from 2 to {MOST_SLOTS}, not {text}")
    if arguments.replays < 1 or arguments.budget <= 0:
        flags.error("--replays must be at least 1 and --budget positive")
    words = tuple(word for word in arguments.layers.split(",") if word)
    options = Options(slots, words, device, arguments.replays, arguments.budget)
    if not selected(options):
        flags.error(f"no layer for {device.type} contains {' or '.join(map(repr, words))}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, writes the record and prints the table last; 1 where a way failed or was wrong."""
    flags = parser()
    arguments = flags.parse_args(argv)
    options = checked(flags, arguments)
    measure.announce(options.device)
    report = run(options, partial(measure.write, path=arguments.json))
    measure.write(report, arguments.json)
    print(table(report))
    return int(any("error" in row for result in report["results"] for row in result["rows"]))


if __name__ == "__main__":
    sys.exit(main())

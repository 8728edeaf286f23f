"""Ways to do one layer of several instances: one after another, constrained together, and coalesced."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_mux.bench.contenders.base import synchronize
from torch_mux.bench.contenders.recording import Recorder
from torch_mux.bench.layer_data import Data, cold_sets
from torch_mux.bench.layers import Layer
from torch_mux.compat.cpu_threads import threads
from torch_mux.lowering.kernels.common import Launch, multiprocessors
from torch_mux.lowering.pack.costs import capped_grid

__all__ = ["COALESCED", "SERIAL", "CpuWays", "GpuWays", "Way", "Ways"]

#: One kernel after another: the contenders that the others are compared with, the better of them.
SERIAL: Final = ("vendor, serial", "own, serial")
COALESCED: Final = "coalesced"
#: A constrained kernel's share of the device, in even shares.
SHARES: Final = (1, 2, 4)
#: Launches in a graph, about: so many that its own launch weighs little.
_NODES: Final = 128


@dataclass
class Way:
    """One way, ready to be replayed.

    Attributes:
        replay: enqueues ``rounds`` rounds, one launch of every instance each.
        found: results of all instances of one round, in the layout of ``Data.exact``.
        plain: they are without activation and residual, which vendors' kernels leave to others.
        kind: "serial", "together" or "coalesced".
        microseconds: of one round, a replay each.
    """

    name: str
    kind: str
    replay: Callable[[], object]
    rounds: int
    found: Tensor
    plain: bool = False
    microseconds: list[float] = field(default_factory=list)


class Ways(Protocol):
    """What a device offers for one layer and number of instances."""

    data: Data

    def names(self) -> Mapping[str, str]:
        """The kind of each way, by name."""
        ...

    def make(self, name: str) -> Way:
        """Runs one way once, for its results, and has it ready to be timed."""
        ...

    def seconds(self, replay: Callable[[], object]) -> float:
        """Of one replay."""
        ...


class GpuWays:
    """CUDA graphs: of vendor's and of our kernels one after another, of ours on branches, and of one launch.

    Weights are taken in turn so that they come from memory. On branches an instance's launches wait for each
    other only; their grids are as many programs as fit on their share of the multiprocessors, or fewer where
    these are as many waves.
    """

    def __init__(self, layer: Layer, count: int, graphs: Recorder, device: torch.device) -> None:
        self._graphs = graphs
        self._sets = cold_sets(layer, count, max(8, _NODES // count))
        self.data = Data(layer, count, self._sets, device)
        self.single = [
            [self.data.launch(index, slot=slot) for index in range(self._sets)] for slot in range(count)
        ]
        self.whole = [self.data.launch(index) for index in range(self._sets)]
        self._sms = multiprocessors(self.data.x.device)

    def caps(self) -> list[int]:
        """Multiprocessors of each constrained kernel; fewer than all."""
        shares = (-(-self._sms * share // self.data.slots) for share in SHARES)
        return [share for share in dict.fromkeys(shares) if share < self._sms]

    def names(self) -> Mapping[str, str]:
        """See :class:`Ways`."""
        together = {f"together, {cap} SMs each": "together" for cap in self.caps()}
        return {
            **dict.fromkeys(SERIAL, "serial"),
            **together,
            "together, uncapped": "together",
            COALESCED: "coalesced",
        }

    def _bodies(self, name: str) -> list[Callable[[], Sequence[Tensor]]]:
        """What the branches of a graph do."""
        if name == COALESCED:
            return [partial(_run, self.whole)]
        if name == SERIAL[1]:
            return [partial(_run, [own[index] for index in range(self._sets) for own in self.single])]
        if name == SERIAL[0]:
            return [self._vendor]
        capped = {f"together, {cap} SMs each": cap for cap in self.caps()}
        cap = capped.get(name, self._sms)
        return [partial(_run, [_constrained(launch, cap) for launch in own]) for own in self.single]

    def _vendor(self) -> Sequence[Tensor]:
        slots = range(self.data.slots)
        found = [[self.data.vendor(index, slot) for slot in slots] for index in range(self._sets)]
        return found[0]

    def make(self, name: str) -> Way:
        """See :class:`Ways`; a launch that fails raises what it raised."""
        plain = name == SERIAL[0]
        # What a first launch does, loading code and choosing a vendor's kernel, cannot be captured.
        if plain:
            with _tuned():
                self._vendor()  # all of it: cuDNN chooses again for weights that are aligned otherwise
        elif name == COALESCED:
            self.whole[0].run()
        else:
            self.single[0][0].run()
        synchronize([(self.data.x,)])
        for out in self.data.outs:
            out.fill_(float("nan"))
        with _tuned():
            recording = self._graphs.record(self._bodies(name))
        recording.replay()
        synchronize([(self.data.x,)])
        if plain:
            found = _as_exact(self.data.layer, recording.outputs)
        else:
            found = torch.cat([out[None] for out in self.data.outs])
        return Way(name, self.names()[name], recording.replay, self._sets, found.clone(), plain)

    def seconds(self, replay: Callable[[], object]) -> float:
        """By events around it."""
        start, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3


@contextmanager
def _tuned() -> Iterator[None]:
    """The vendor's convolutions are the fastest that cuDNN finds by trying."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _run(launches: Sequence[Launch]) -> Sequence[Tensor]:
    for launch in launches:
        launch.run()
    return [launches[-1].arguments["out"]]


def _constrained(launch: Launch, sms: int) -> Launch:
    """The launch with the grid that it has beside others."""
    return replace(launch, grid=capped_grid(launch.operation, launch.tile, launch.grid, sms))


def _as_exact(layer: Layer, outputs: Sequence[Tensor]) -> Tensor:
    """Vendors' results of one round, [1, T, ...] with channels last."""
    stacked = torch.stack(list(outputs))
    return (stacked if layer.conv is None else stacked.permute(0, 1, 3, 4, 2))[None]


class CpuWays:
    """Vendor calls on the CPU: one after another over all cores, together on a core each, and as one call.

    What a grid cap is to a GPU, a number of threads is here. One call is a batched product or a grouped
    convolution over stacked weights.
    """

    def __init__(self, layer: Layer, count: int, workers: ThreadPoolExecutor) -> None:
        self.data = Data(layer, count, 3, torch.device("cpu"), torch.float32)
        self._workers = workers

    def names(self) -> Mapping[str, str]:
        """See :class:`Ways`."""
        return {SERIAL[0]: "serial", "together, a core each": "together", COALESCED: "coalesced"}

    def _round(self, name: str, index: int) -> Sequence[Tensor]:
        slots = range(self.data.slots)
        if name == SERIAL[0]:
            return [self.data.vendor(index, slot) for slot in slots]
        if name == COALESCED:
            return self._batched(index)
        return list(self._workers.map(partial(self._alone, index), slots))

    def _alone(self, index: int, slot: int) -> Tensor:
        with threads(1), torch.inference_mode():
            return self.data.vendor(index, slot)

    def _batched(self, index: int) -> Sequence[Tensor]:
        data, layer, count = self.data, self.data.layer, self.data.slots
        x = data.xs[index % len(data.xs)]
        weights = data.vendors[index * count : (index + 1) * count]
        if layer.conv is None:
            return torch.baddbmm(data.bias[:, None], x, weights.transpose(1, 2)).unbind()
        _, _, _, stride, padding = layer.conv
        images = x[:, 0].permute(0, 3, 1, 2).flatten(0, 1)[None]
        found = F.conv2d(
            images, weights.flatten(0, 1), data.bias.flatten(), stride, padding, groups=count * data.groups
        )
        return found.reshape(count, 1, layer.n, *found.shape[2:]).unbind()

    def make(self, name: str) -> Way:
        """See :class:`Ways`."""
        turns = range(self.data.sets)

        def replay() -> None:
            for index in turns:
                self._round(name, index)

        replay()
        found = _as_exact(self.data.layer, self._round(name, 0))
        return Way(name, self.names()[name], replay, self.data.sets, found, plain=True)

    def seconds(self, replay: Callable[[], object]) -> float:
        """By the clock."""
        start = time.perf_counter()
        replay()
        return time.perf_counter() - start

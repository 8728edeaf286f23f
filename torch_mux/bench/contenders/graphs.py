"""Inductor's code of each tenant in CUDA graphs: one after another, on streams, as branches of one graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from torch_mux.bench.contenders import recording
from torch_mux.bench.contenders.base import Arguments, Peer
from torch_mux.bench.contenders.inductor import PLAIN, Flavour, inductor_callables
from torch_mux.bench.contenders.recording import Captured, Recorder, captured, run
from torch_mux.bench.workloads import Tenants

__all__ = ["ForkedGraph", "GraphEach", "GraphStreams"]


class GraphEach(Peer):
    """One CUDA graph a tenant, replayed one after another."""

    ending = "+ CUDA graphs, one after another"

    def __init__(self, flavour: Flavour = PLAIN) -> None:
        self.flavour = flavour
        self.name = f"{flavour.words} {self.ending}"
        self.graphs: list[Captured] = []

    def prepare(self, tenants: Tenants, counts: Sequence[int]) -> None:
        record = recording.recorder(tenants.device)
        calls = inductor_callables(tenants, self.flavour)
        pairs = zip(calls, tenants.requests[0], strict=True)
        self.graphs = [self.graph(record, index, call, args) for index, (call, args) in enumerate(pairs)]

    def graph(
        self, record: Recorder, index: int, call: Callable[..., Tensor], args: tuple[Tensor, ...]
    ) -> Captured:
        """Of one tenant."""
        return captured(record, [call], [args])

    def round(self, requests: Arguments) -> Sequence[Any]:
        graphs = self.graphs[: len(requests)]
        return run(graphs, requests, lambda: self.replay(graphs))

    def replay(self, graphs: Sequence[Captured]) -> None:
        """All of them, whose arguments are in place."""
        for graph in graphs:
            graph.replay()

    def release(self) -> None:
        self.graphs = []


class GraphStreams(GraphEach):
    """The same graphs, each on a stream of its own, where each waits for the caller's and it for all."""

    ending = "+ CUDA graphs, each on a stream"

    def graph(
        self, record: Recorder, index: int, call: Callable[..., Tensor], args: tuple[Tensor, ...]
    ) -> Captured:
        self.record = record
        record.lanes(index + 1)
        return captured(record, [call], [args], beside=index)

    def replay(self, graphs: Sequence[Captured]) -> None:
        self.record.start()
        for index, graph in enumerate(graphs):
            with self.record.lane(index):
                graph.replay()
        self.record.finish(len(graphs))


class ForkedGraph(Peer):
    """One CUDA graph with a branch, on a stream of its own, a tenant."""

    def __init__(self, flavour: Flavour = PLAIN) -> None:
        self.flavour = flavour
        self.name = f"{flavour.words}, one CUDA graph of forked branches"
        self.graphs: dict[int, Captured] = {}

    def prepare(self, tenants: Tenants, counts: Sequence[int]) -> None:
        record = recording.recorder(tenants.device)
        calls = inductor_callables(tenants, self.flavour)
        for count in counts:
            requests = tenants.requests[0][:count]
            self.graphs[count] = captured(record, calls[:count], requests)

    def round(self, requests: Arguments) -> Sequence[Any]:
        return self.graphs[len(requests)].run(requests)

    def release(self) -> None:
        self.graphs = {}

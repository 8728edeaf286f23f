"""Ours and the peers: ways to answer one request of every tenant.

Peers: Inductor's code for each tenant captured in one CUDA graph a tenant and replayed one after another, and
one CUDA graph with a forked branch a tenant. Every contender takes changing inputs and returns fresh tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

import torch_mux
from torch_mux import state
from torch_mux.bench.workloads import Tenants

__all__ = ["CONTENDERS", "Contender", "default_contenders"]

Arguments = Sequence[tuple[Tensor, ...]]


class Contender(Protocol):
    """One way to serve a round: one request of each of the first n tenants."""

    name: str

    def prepare(self, tenants: Tenants, counts: Sequence[int]) -> None:
        """Compile and capture for rounds of the given numbers of tenants."""
        ...

    def round(self, requests: Arguments) -> Sequence[Any]:
        """Enqueue one round, one request a tenant; what it returns belongs to the caller."""
        ...

    def notes(self) -> dict[str, object]:
        """What is worth recording besides times."""
        ...

    def release(self) -> None:
        """Give back graphs and buffers."""
        ...


class OneByOne:
    """``torch.compile`` with its default backend, called one tenant after another."""

    name = "inductor, one after another"

    def __init__(self) -> None:
        self.callables: list[Callable[..., Tensor]] = []

    def prepare(self, tenants: Tenants, counts: Sequence[int]) -> None:
        self.callables = inductor_callables(tenants)

    def round(self, requests: Arguments) -> Sequence[Any]:
        return [call(*args) for call, args in zip(self.callables, requests, strict=False)]

    def notes(self) -> dict[str, object]:
        return {}

    def release(self) -> None:
        self.callables = []


class Eager(OneByOne):
    """The models as they are, one after another."""

    name = "eager, one after another"

    def prepare(self, tenants: Tenants, counts: Sequence[int]) -> None:
        self.callables = list(tenants.tensor_only())


def inductor_callables(tenants: Tenants) -> list[Callable[..., Tensor]]:
    """Each tenant's model under ``torch.compile``, compiled once for all peers, and called once."""
    if not tenants.compiled:
        compiled: list[Callable[..., Tensor]] = [torch.compile(model) for model in tenants.tensor_only()]
        for call, args in zip(compiled, tenants.requests[0], strict=True):
            call(*args)
        tenants.compiled.extend(compiled)
    return tenants.compiled


class _Captured:
    """Static inputs and outputs of captured graphs, copied into and out of with one launch a list."""

    def __init__(self) -> None:
        self.inputs: list[tuple[Tensor, ...]] = []
        self.outputs: list[Tensor] = []

    def fill(self, requests: Arguments) -> None:
        targets = [x for args in self.inputs for x in args]
        torch._foreach_copy_(targets, [x for args in requests for x in args])

    def fresh(self) -> list[Tensor]:
        answers = [torch.empty_like(output) for output in self.outputs]
        torch._foreach_copy_(answers, self.outputs)
        return answers


class GraphEach:
    """One CUDA graph a tenant over Inductor's code, replayed one after another."""

    name = "inductor + CUDA graphs, one after another"

    def __init__(self) -> None:
        self.graphs: list[tuple[torch.cuda.CUDAGraph, _Captured]] = []

    def prepare(self, tenants: Tenants, counts: Sequence[int]) -> None:
        callables = inductor_callables(tenants)
        pool = torch.cuda.graph_pool_handle()
        for call, args in zip(callables, tenants.requests[0], strict=True):
            captured, graph = _Captured(), torch.cuda.CUDAGraph()
            captured.inputs = [tuple(x.clone() for x in args)]
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                captured.outputs = [call(*captured.inputs[0])]
            self.graphs.append((graph, captured))

    def round(self, requests: Arguments) -> Sequence[Any]:
        answers = []
        for (graph, captured), args in zip(self.graphs, requests, strict=False):
            captured.fill([args])
            graph.replay()
            answers += captured.fresh()
        return answers

    def notes(self) -> dict[str, object]:
        return {}

    def release(self) -> None:
        self.graphs = []


class ForkedGraph:
    """One CUDA graph with a branch, on a stream of its own, a tenant, over Inductor's code."""

    name = "inductor, one CUDA graph of forked branches"

    def __init__(self) -> None:
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, _Captured]] = {}

    def prepare(self, tenants: Tenants, counts: Sequence[int]) -> None:
        callables = inductor_callables(tenants)
        streams = [torch.cuda.Stream() for _ in callables]  # type: ignore[no-untyped-call]
        for count in counts:
            captured, graph = _Captured(), torch.cuda.CUDAGraph()
            captured.inputs = [tuple(x.clone() for x in args) for args in tenants.requests[0][:count]]
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                trunk = torch.cuda.current_stream()
                for stream, call, args in zip(streams, callables, captured.inputs, strict=False):
                    stream.wait_stream(trunk)
                    with torch.cuda.stream(stream):
                        captured.outputs.append(call(*args))
                for stream in streams[:count]:
                    trunk.wait_stream(stream)
            self.graphs[count] = (graph, captured)

    def round(self, requests: Arguments) -> Sequence[Any]:
        graph, captured = self.graphs[len(requests)]
        captured.fill(requests)
        graph.replay()
        return captured.fresh()

    def notes(self) -> dict[str, object]:
        return {}

    def release(self) -> None:
        self.graphs = {}


class Mux:
    """``torch_mux.gather`` over models compiled with ``backend="mux"``."""

    def __init__(self, raw: bool = False, patience: float = 180.0) -> None:
        self.name = "torch-mux gather, model's own output" if raw else "torch-mux gather"
        self.raw = raw
        self.patience = patience
        self.models: list[Any] = []
        self.recorded: dict[str, object] = {}

    def prepare(self, tenants: Tenants, counts: Sequence[int]) -> None:
        own = self.raw or tenants.workload.returns_tensor
        served = tenants.models if own else tenants.tensor_only()
        self.models = [torch.compile(model, backend="mux") for model in served]
        for count in counts:
            requests = tenants.requests[0][:count]
            share = self._settle(requests)
            self.recorded[f"coalesced share at {count}"] = share
        # What compiles in the background would share the interpreter with what is timed.
        if not state.engine().quiesce(self.patience, ahead=True):
            raise TimeoutError(f"still compiling ahead after {self.patience:.0f} s")
        self.recorded["explain"] = str(torch_mux.explain())

    def _settle(self, requests: Arguments) -> float | None:
        """Rounds until one changes nothing: all is compiled and captured; at most ``patience`` seconds.

        Returns the share of the last round that went out coalesced with others.

        Raises:
            TimeoutError: it was still compiling or capturing then.
        """
        deadline = time.monotonic() + self.patience
        before: tuple[object, ...] | None = None
        while True:
            tenant = f"bench-settle-{len(requests)}-{time.monotonic_ns()}"
            with torch_mux.quota(tenant):
                self.round(requests)
            synchronize(requests)
            if not state.engine().quiesce(max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"still compiling or capturing after {self.patience:.0f} s")
            got = torch_mux.stats().tenants.get(tenant)
            share = None if got is None else got.coalesced_share
            programs = torch_mux.explain().programs
            now = (share, *((program.fingerprint, program.captured) for program in programs))
            if now == before:
                return share
            before = now

    def round(self, requests: Arguments) -> Sequence[Any]:
        return torch_mux.gather(*[(model, *args) for model, args in zip(self.models, requests, strict=False)])

    def notes(self) -> dict[str, object]:
        return self.recorded

    def release(self) -> None:
        for model in self.models:
            torch_mux.remove(model)
        self.models = []


def synchronize(requests: Arguments) -> None:
    """Wait for the device of the requests."""
    if requests[0][0].is_cuda:
        torch.cuda.synchronize()


CONTENDERS: dict[str, Callable[[], Contender]] = {
    "eager": Eager,
    "inductor": OneByOne,
    "graphs": GraphEach,
    "forked": ForkedGraph,
    "mux": Mux,
    "mux-raw": lambda: Mux(raw=True),
}


def default_contenders(device: torch.device) -> list[str]:
    """The peers worth comparing with on a device, ours last."""
    return ["graphs", "forked", "mux"] if device.type == "cuda" else ["eager", "inductor", "mux"]

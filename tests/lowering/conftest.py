"""Captures small functions as programs and runs batched graphs without compiling them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from torch_mux.lowering.capture import capture
from torch_mux.lowering.coalesce import lay_out, mark
from torch_mux.lowering.graphs import fake_of
from torch_mux.lowering.passes import run_passes
from torch_mux.lowering.plan import stack_buffer
from torch_mux.lowering.prepare import split_prepare
from torch_mux.lowering.program import Program
from torch_mux.lowering.segments import cut, trace
from torch_mux.lowering.storage import Storage
from torch_mux.settings import Settings
from torch_mux.types import TensorSpec


@dataclass(frozen=True)
class Batched:
    """A function's one coalesced segment: its graph, and what it computes for a list of requests."""

    program: Program
    graph: GraphModule
    targets: list[str]
    reasons: list[str]
    run: Callable[[Sequence[Sequence[Tensor]], Sequence[Sequence[Tensor]]], list[list[Tensor]]]


def _program(function: Callable[..., Any], inputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> Program:
    with torch.no_grad():
        graph = make_fx(lambda *args: function(*args), tracing_mode="fake")(*inputs, *parameters)
    static = range(len(inputs), len(inputs) + len(parameters))
    return capture(graph, static, "case")


def _module(program: Program) -> GraphModule:
    graph = torch.fx.Graph()
    output = graph.graph_copy(program.graph.graph, mapping := {})
    graph.output(output)
    for old, new in mapping.items():
        new.meta = dict(old.meta)
    return run_passes(GraphModule(program.graph, graph), Settings())


def _batched(
    function: Callable[..., Any], inputs: Sequence[Tensor], parameters: Sequence[Tensor] = ()
) -> Batched:
    program = _program(function, inputs, parameters)
    prepare, body = split_prepare(_module(program))
    cpu, exact = torch.device("cpu"), (False, False)
    reasons = mark(body, prepare, cpu, exact)
    segments = cut(body, reasons)
    layout = lay_out(
        body, prepare, [node for segment in segments if segment.coalesced for node in segment.nodes]
    )
    storage = Storage(program.fingerprint, cpu, prepare, layout)
    texts = [str(reason) for reason in dict.fromkeys(reasons.values())]
    segment = segments[0]
    if reasons:
        return Batched(program, body, [], texts, lambda *_: [])
    graph, space, _ = trace(body, segment, layout, cpu, storage.key, exact)
    assert min(space.limits()) >= 64, space.shapes.knowledge()
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]

    def run(requests: Sequence[Sequence[Tensor]], weights: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        rows = torch.tensor([storage.bind(list(weight)) for weight in weights])
        stacked = []
        for index, node in enumerate(segment.inputs):
            buffer = stack_buffer(TensorSpec.of(fake_of(node)), len(requests))
            for slot, request in enumerate(requests):
                buffer[slot].copy_(request[node.meta["mux_index"]])
            assert index == len(stacked)
            stacked.append(buffer)
        control = torch.tensor([len(requests), 1], dtype=torch.int32)
        results = graph(rows, control, storage.table, *storage.arenas.values(), *stacked)
        for node, result in zip(segment.results, results, strict=True):
            value = fake_of(node)
            assert tuple(result.shape[1:]) == tuple(value.shape) and result.dtype == value.dtype
        return [[result[slot] for result in results] for slot in range(len(requests))]

    run.storage = storage  # type: ignore[attr-defined]
    return Batched(program, graph, targets, texts, run)


@pytest.fixture
def program_of() -> Callable[..., Program]:
    """(function, inputs, parameters) → Program; the function takes inputs, then parameters."""
    return _program


@pytest.fixture
def lowered() -> Callable[..., GraphModule]:
    """Program → its graph after every pass."""
    return _module


@pytest.fixture
def batched() -> Callable[..., Batched]:
    """(function, inputs, parameters) → Batched."""
    return _batched

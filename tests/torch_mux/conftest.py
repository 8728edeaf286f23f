"""A backend and an engine that run every graph at once, so that the face can be tested on its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext

from torch_mux import compat
from torch_mux.recording import Call, current
from torch_mux.types import Quota


class FakeRequest:
    """A request that is done when it is made."""

    def __init__(self, outputs: list[object] | None, error: BaseException | None) -> None:
        self.outputs, self.error = outputs, error

    def result(self) -> list[object]:
        if self.error is not None:
            raise self.error
        assert self.outputs is not None
        return self.outputs

    def outcome(self) -> list[object]:
        return self.result()

    def done(self) -> bool:
        return True

    def cancel(self) -> bool:
        return False

    def add_done_callback(self, function: Callable[[Any], None]) -> None:
        function(self)


class FakeEngine:
    """Counts what goes through it."""

    def __init__(self) -> None:
        self.submitted: list[tuple[Any, list[object], Quota]] = []

    def submit(self, instance: Any, inputs: Sequence[object], quota: Quota) -> FakeRequest:
        self.submitted.append((instance, list(inputs), quota))
        program = instance.program
        try:
            return FakeRequest(list(program.graph(*program.join(inputs, instance.parameters))), None)
        except RuntimeError as error:
            return FakeRequest(None, error)

    def wait(self, requests: Sequence[FakeRequest]) -> None:
        """Everything went out at submission."""

    def kick(self) -> None:
        """Nothing is ever pending."""


class FakeProgram:
    """Splits flat arguments by the positions that were parameters when the graph was made."""

    def __init__(self, graph: torch.fx.GraphModule, parameters: set[int], count: int) -> None:
        self.graph = graph
        self.fallback = None
        self.parameter_positions = sorted(parameters)
        self.input_positions = [position for position in range(count) if position not in parameters]
        self.mutates = any(
            isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
            for node in graph.graph.nodes
        )

    def split(self, args: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        return [args[p] for p in self.input_positions], [args[p] for p in self.parameter_positions]

    def join(self, inputs: Sequence[Any], parameters: Sequence[Any]) -> list[Any]:
        flat = dict(zip(self.input_positions, inputs)) | dict(zip(self.parameter_positions, parameters))
        return [flat[position] for position in sorted(flat)]


class FakeEntry:
    """What the real backend's entry shows to the learned path."""

    _boxed_call = True

    def __init__(
        self, engine: FakeEngine, program: FakeProgram, graph_break: bool, guards: tuple[str, ...]
    ) -> None:
        self.engine, self.program, self.graph_break, self.guards = engine, program, graph_break, guards
        self.runs = 0

    def __call__(self, args: list[Any]) -> list[Any]:
        self.runs += 1
        kept = tuple(args)
        _, parameters = self.program.split(kept)
        instance = SimpleNamespace(program=self.program, parameters=parameters, dropped=False)
        outputs = list(self.program.graph(*kept))
        recorder = current()
        if recorder is not None:
            recorder.append(Call(self, kept, instance, tuple(outputs)))
        return outputs


class FakeMux:
    """``torch.compile(model, backend=fake)``; ``fake.entries`` are its graphs."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.entries: list[FakeEntry] = []

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Any], **_: Any) -> Any:
        guards = compat.frame_guards()
        graph_break = bool(gm.compile_subgraph_reason.graph_break)

        def inner(graph: torch.fx.GraphModule, inputs: list[Any]) -> FakeEntry:
            static = set(TracingContext.get().fw_metadata.static_input_indices)
            entry = FakeEntry(self.engine, FakeProgram(graph, static, len(inputs)), graph_break, guards)
            self.entries.append(entry)
            return entry

        compiled = aot_autograd(fw_compiler=lambda graph, _: graph.forward, inference_compiler=inner)
        return compiled(gm, example_inputs)

    @property
    def runs(self) -> int:
        return sum(entry.runs for entry in self.entries)


@pytest.fixture
def fake() -> FakeMux:
    torch._dynamo.reset()
    return FakeMux()

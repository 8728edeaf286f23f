"""A small lowering to test the runtime with: y = x * weight + bias and x * 2, in plain torch operations."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_mux.lowering.program import Program
from torch_mux.runtime.engine import Engine
from torch_mux.runtime.executors.base import Executor
from torch_mux.runtime.executors.cpu import CpuExecutor
from torch_mux.runtime.request import Request
from torch_mux.settings import Settings
from torch_mux.types import FallbackKind, FallbackReason, Quota, TensorSpec

WIDTH = 4


class Affine(nn.Module):
    """What the programs here compute."""

    def __init__(self, scale: float = 1.0, device: str = "cpu") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((WIDTH,), scale, device=device))
        self.bias = nn.Parameter(torch.zeros(WIDTH, device=device))

    def tensors(self) -> list[Tensor]:
        return [self.weight, self.bias]


class FakeStorage:
    """Rows are dictionary entries with copies of the weights, as a prepared copy would be."""

    def __init__(self, device: torch.device) -> None:
        self.generation = 1
        self.rows: dict[int, Tensor] = {}
        self.sources: dict[int, list[weakref.ref[Tensor]]] = {}
        self.stamps: dict[int, list[tuple[int, int]]] = {}
        self.table = torch.zeros(256, 2, WIDTH, device=device)
        self.refreshes = 0
        self._free = list(range(255, -1, -1))

    @staticmethod
    def _stamp(parameters: Sequence[Tensor]) -> list[tuple[int, int]]:
        return [(parameter._version, parameter.data_ptr()) for parameter in parameters]

    def bind(self, parameters: Sequence[Tensor]) -> int:
        row = self._free.pop()
        self._write(row, parameters)
        return row

    def _write(self, row: int, parameters: Sequence[Tensor]) -> None:
        self.stamps[row] = self._stamp(parameters)
        self.sources[row] = [weakref.ref(parameter) for parameter in parameters]
        if parameters:
            self.table[row, 0].copy_(parameters[0])
            self.table[row, 1].copy_(parameters[1])
            if self.table.is_cuda:
                torch.cuda.current_stream(self.table.device).synchronize()

    def stale(self, row: int) -> bool:
        sources = [source() for source in self.sources[row]]
        found = [source for source in sources if source is not None]
        return len(found) == len(sources) and self._stamp(found) != self.stamps[row]

    def watched(self, row: int) -> None:
        """Nothing that could be compared without the interpreter's lock."""

    def refresh(self, row: int, parameters: Sequence[Tensor]) -> None:
        self.refreshes += 1
        self._write(row, parameters)

    def release(self, row: int) -> None:
        del self.stamps[row], self.sources[row]
        self._free.append(row)

    def nbytes(self, row: int) -> int:
        return 2 * WIDTH * 4

    @property
    def bound(self) -> int:
        return len(self.stamps)


class FakePlan:
    """Plays the part of lowering's CompiledPlan and notes what it was asked to run."""

    def __init__(self, program: Program, coalesced: bool = True, capturable: bool = True) -> None:
        self.program = program
        self.coalesced = coalesced
        self.capturable = capturable
        self.small = self.from_disk = False
        self.max_slots = 1 << 20
        self.work = 1
        self.reasons: tuple[FallbackReason, ...] = ()
        self.report = {"kernels": 1}
        self.storage = FakeStorage(program.device)
        self.bundles: list[int] = []
        self.controls: list[list[int]] = []
        self.threads: list[int] = []
        self.before: Callable[[list[Tensor]], object] = lambda inputs: None

    def run(self, rows: Tensor, control: Tensor, inputs: list[Tensor]) -> list[Tensor]:
        self.bundles.append(rows.shape[0])
        self.threads.append(threading.get_ident())
        if rows.device.type == "cpu":
            self.controls.append(control.tolist())
        self.before(inputs)
        weights = self.storage.table[rows]
        return [inputs[0] * weights[:, 0] + weights[:, 1], inputs[0] * 2]

    def launches(self, slots: int) -> list[Any]:
        return []

    def run_alone(self, parameters: Sequence[Tensor], inputs: Sequence[object]) -> list[object]:
        self.bundles.append(1)
        x = inputs[0]
        assert isinstance(x, Tensor)
        self.before([x])
        return [x * parameters[0] + parameters[1], x * 2]


def stack(spec: TensorSpec, slots: int) -> Tensor:
    return torch.empty((slots, *spec.shape), dtype=spec.dtype, device=spec.device)


@dataclass
class Lab:
    """Engines, programs and calls for the tests."""

    engines: list[Engine] = field(default_factory=list)
    plans: dict[str, FakePlan] = field(default_factory=dict)
    slow: dict[str, threading.Event] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    alone: set[str] = field(default_factory=set)
    compiled: list[str] = field(default_factory=list)
    at_last: list[Callable[[], object]] = field(default_factory=list)
    Affine = Affine
    stack = staticmethod(stack)

    def compile_plan(self, program: Program, settings: Settings) -> Any:
        if program.name in self.slow:
            assert self.slow[program.name].wait(20)
        if program.name in self.broken:
            raise ValueError(f"no code for {program.name}")
        self.compiled.append(program.name)
        coalesced = program.fallback is None and program.name not in self.alone
        plan = FakePlan(program, coalesced)
        reason = program.fallback
        retired = reason is not None and reason.kind is FallbackKind.RETIRED
        self.plans[f"{program.name} alone" if retired else program.name] = plan
        return plan

    def engine(
        self,
        clock: Callable[[], float] = time.perf_counter,
        executor: Callable[[Engine, torch.device], Executor] | None = None,
        **settings: Any,
    ) -> Engine:
        make = executor or (lambda engine, device: CpuExecutor(device, stack))
        plan: Any = self.compile_plan
        engine = Engine(Settings(**settings), clock, compile_plan=plan, executor=make)
        self.engines.append(engine)
        return engine

    def gpu_engine(self, **settings: Any) -> Engine:
        """An engine with the real CUDA executor, stack buffers and transport kernels."""
        plan: Any = self.compile_plan
        engine = Engine(Settings(**settings), compile_plan=plan)
        self.engines.append(engine)
        return engine

    def program(
        self, name: str = "affine", mutates: bool = False, device: str = "cpu", parameters: int = 2
    ) -> Program:
        spec = TensorSpec((WIDTH,), (1,), torch.float32, torch.device(device))
        fallback = None
        if name in self.alone:
            fallback = FallbackReason(FallbackKind.NO_RULE, name)
        fields: dict[str, Any] = {
            "fingerprint": f"print-{name}",
            "name": name,
            "device": torch.device(device),
            "inputs": (spec,),
            "parameters": (spec,) * parameters,
            "outputs": (spec, None, spec) if name.startswith("holes") else (spec, spec),
            "input_positions": (parameters,),
            "parameter_positions": tuple(range(parameters)),
            "mutates": mutates,
            "fallback": fallback,
            "graph": torch.fx.GraphModule({}, torch.fx.Graph()),
        }
        return Program(**fields)

    @staticmethod
    def x(value: float = 1.0, device: str = "cpu") -> Tensor:
        return torch.full((WIDTH,), value, device=device)

    def submit(
        self, engine: Engine, program: Program, model: Affine, value: float = 1.0, quota: Quota | None = None
    ) -> Request:
        device = str(program.device)
        instance = engine.instance(program, model.tensors())
        return engine.submit(instance, [self.x(value, device)], quota or Quota())

    def call(self, engine: Engine, program: Program, model: Affine, value: float = 1.0) -> Tensor:
        result = engine.call(program, [*model.tensors(), self.x(value, str(program.device))], Quota())[0]
        assert isinstance(result, Tensor)
        return result

    @staticmethod
    def answers(requests: Sequence[Request], seconds: float = 10.0) -> list[Any]:
        """What other threads get, within real seconds: the first number, or the kind of the error."""
        got: list[Any] = [None] * len(requests)

        def read(index: int) -> None:
            try:
                output = requests[index].result()[0]
                assert isinstance(output, Tensor)
                got[index] = output[0].item()
            except Exception as error:
                got[index] = type(error)

        threads = [
            threading.Thread(target=read, args=(index,), daemon=True) for index in range(len(requests))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(seconds)
            assert not thread.is_alive(), "a call hangs"
        return got

    @staticmethod
    def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
        """Waits for what another thread does."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.002)


@pytest.fixture
def lab() -> Iterator[Lab]:
    made = Lab()
    yield made
    for event in made.slow.values():
        event.set()
    for release in made.at_last:
        release()
    for engine in made.engines:
        engine.close()

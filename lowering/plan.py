"""From a program to what the runtime executes."""

from __future__ import annotations

import importlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from torch_mux import compat
from torch_mux.settings import Settings
from torch_mux.types import FallbackKind, FallbackReason, TensorSpec

from . import kept_plans
from .coalesce import MOST_ROWS, MOST_SLOTS, SlotSpace, dense_order, lay_out, mark
from .flops import flops
from .graphs import ROLE, call_nodes, fake_of, outputs_of, placeholders
from .kernels import ahead
from .launches import KernelCalls
from .ops.attention import ATTENTION
from .ops.block import BLOCK
from .ops.semantic import CONVOLUTION, LINEAR, LINEARS, is_depthwise
from .passes import run_passes
from .prepare import INDEX, Prepare, split_prepare
from .program import Program
from .recipe import PlanRecipe, PlanReport, StepRecipe
from .segments import Segment, cut, single_slot, trace
from .storage import Layout, Storage

if TYPE_CHECKING:
    from .kernels.code import Buildable

__all__ = ["CompiledPlan", "PlanReport", "compile_plan", "find_plan", "stack_buffer"]

log = logging.getLogger(__name__)
_KERNELS: dict[Any, str] = {
    LINEAR: "linear",
    LINEARS: "joined linear",
    CONVOLUTION: "conv",
    BLOCK: "block",
    ATTENTION: "attention",
    torch.ops.aten.embedding.default: "embedding",
}
Artifact = Callable[[list[Any]], Any]
# Floating-point operations of one slot in an average super-kernel: some 270 us of a core at 30 GFLOP/s.
# Waking the threads of another core takes 50 to 100, more where every client thread has threads of its own.
_SMALL = 8_000_000


def stack_buffer(spec: TensorSpec, slots: int) -> Tensor:
    """An uninitialised [slots, *shape] whose slots are dense in the memory order of ``spec``."""
    order = dense_order(spec)
    dense = torch.empty((slots, *(spec.shape[dim] for dim in order)), dtype=spec.dtype, device=spec.device)
    return dense.permute(0, *(order.index(dim) + 1 for dim in range(len(order))))


@dataclass(frozen=True)
class _Step:
    """A segment with its code."""

    recipe: StepRecipe
    artifact: Artifact


class CompiledPlan:
    """An executable form of a program.

    ``coalesced`` plans serve any subset of instances at any slot count up to ``max_slots`` with one compiled
    artifact; the others serve one request at a time through :meth:`run_alone`. ``capturable`` plans may be
    captured in a CUDA graph. ``small`` ones have so little work an operation that a core of a CPU is enough:
    a property of the program, so that how sums are split over threads never depends on the bundle.
    ``from_disk`` ones an earlier process had left. ``work`` is what a slot costs: floating-point operations,
    at least 1.
    """

    def __init__(
        self,
        program: Program,
        reasons: tuple[FallbackReason, ...],
        report: PlanReport,
        storage: Storage,
        steps: tuple[_Step, ...],
        outputs: tuple[int, ...],
        alone: Artifact | None,
        from_disk: bool = False,
    ) -> None:
        self.program = program
        self.reasons = reasons
        self.report = report
        self.storage = storage
        self.from_disk = from_disk
        self.coalesced = alone is None
        self.capturable = alone is None and all(step.recipe.coalesced for step in steps)
        self.max_slots = min((step.recipe.slots for step in steps), default=1)
        operations = sum(report.kernels.values())
        self.small = operations > 0 and report.flops < _SMALL * operations
        self.work = max(1, report.flops)
        self._steps = steps
        self._outputs = outputs
        self._alone = alone

    def run(self, rows: Tensor, control: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
        """One bundle.

        Args:
            rows: int64 [T], the storage row of each slot.
            control: int32 [2], (active slots, cap in SMs); slots from ``active`` on hold garbage but valid
            rows.
            inputs: [T, *shape] for each tensor input, as :func:`stack_buffer` lays them out.

        Returns:
            [T, *shape] for each tensor output of the program, in order.
        """
        storage = self.storage
        environment: dict[int, Tensor] = dict(enumerate(inputs))
        for step in self._steps:
            gathered = [environment[index] for index in step.recipe.inputs]
            if step.recipe.coalesced:
                results = step.artifact([rows, control, storage.table, *storage.arenas.values(), *gathered])
            else:
                results = self._run_slots(step, rows, gathered)
            environment.update(zip(step.recipe.results, results, strict=True))
        return [environment[index] for index in self._outputs]

    def launches(self, slots: int) -> list[Buildable]:
        """The super-kernels that :meth:`run` launches for a bundle of ``slots`` slots."""
        found: list[Buildable] = []
        for step in self._steps:
            ready, kernels = step.recipe.ready.get(slots), step.recipe.kernels
            if ready is not None:
                found += ready
            elif kernels is not None:
                found += kernels.launches(slots)
        return found

    def _run_slots(self, step: _Step, rows: Tensor, gathered: Sequence[Tensor]) -> list[Tensor]:
        stacked = [stack_buffer(spec, rows.shape[0]) for spec in step.recipe.specs]
        for slot, row in enumerate(rows.tolist()):
            values = self.storage.values(row)
            arguments = [tensor[slot] for tensor in gathered] + [
                values[index] for index in step.recipe.parameters
            ]
            for buffer, result in zip(stacked, step.artifact(arguments), strict=True):
                buffer[slot].copy_(result)
        return stacked

    def run_alone(self, parameters: Sequence[Tensor], inputs: Sequence[object]) -> list[object]:
        """One request of a program that is not coalesced; all graph outputs in fresh storage, in order."""
        if self._alone is None:
            raise TypeError(f"{self.program.name} is coalesced; use run()")
        outputs = list(self._alone(self.program.join(inputs, parameters)))
        self.program.derive(outputs, inputs, parameters)
        return outputs


def find_plan(program: Program, settings: Settings) -> CompiledPlan | None:
    """The plan that an earlier process left on disk, or None. Traces nothing and needs no lock."""
    if program.fallback is not None or not settings.keep_plans or _without_triton(program) is not None:
        return None
    compat.native.build()
    name = kept_plans.name_of(program)
    found = None if name is None else kept_plans.load(name)
    return None if found is None else _restored(program, *found)


def compile_plan(program: Program, settings: Settings) -> CompiledPlan:
    """Lowers and compiles ``program``; takes seconds. The caller holds the compile lock."""
    compat.native.build()
    if program.fallback is not None:
        return _whole(program, _every(program, program.fallback))
    missing = _without_triton(program)
    if missing is not None:
        return _whole(program, _every(program, missing))
    try:
        return _lowered(program, settings, kept_plans.name_of(program) if settings.keep_plans else None)
    except Exception as error:
        log.warning("%s does not coalesce: %s", program.name, error, exc_info=True)
        return _whole(program, _every(program, _failed(program, error)))


def _without_triton(program: Program) -> FallbackReason | None:
    """Why a program for a GPU cannot have super-kernels in this process."""
    if program.device.type != "cuda":
        return None
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return FallbackReason(FallbackKind.NO_TRITON, program.name, str(error))
    return None


def _failed(program: Program, error: Exception, outcome: str = "") -> FallbackReason:
    detail = f"{type(error).__name__}: {error}".split("\n")[0]
    return FallbackReason(FallbackKind.COMPILE_FAILED, program.name, detail + outcome)


def _every(program: Program, reason: FallbackReason) -> dict[FallbackReason, int]:
    """All operations of a program for one reason."""
    return {reason: len(call_nodes(program.graph.graph))}


def _whole(program: Program, counts: dict[FallbackReason, int]) -> CompiledPlan:
    """The plan of a program that runs per instance; ``counts`` as in :class:`PlanReport`."""
    artifact = program.artifact
    if artifact is None:
        try:
            artifact = _inductor_static(program.graph)
        except Exception as error:
            log.warning("%s does not compile: %s", program.name, error, exc_info=True)
            counts |= _every(program, _failed(program, error, "; it runs operation by operation"))
            artifact = _by_operation(program.graph)
    empty = Prepare(GraphModule({}, torch.fx.Graph()), (), (), ())
    storage = Storage(program.fingerprint, torch.device("cpu"), empty, Layout((), {}, {}))  # has no rows
    calls = call_nodes(program.graph.graph)
    work = flops(calls)
    report = PlanReport(
        alone=len(calls), counts=counts, flops=work, flops_alone=work, segments=("per instance",)
    )
    return CompiledPlan(program, tuple(counts), report, storage, (), (), artifact)


def _by_operation(module: GraphModule) -> Artifact:
    def run(arguments: list[Any]) -> Any:
        return module(*arguments)

    return run


def _inductor_static(module: GraphModule) -> Artifact:
    """Inductor's code for a graph whose placeholders carry static fakes."""
    fakes = [node.meta["val"] for node in placeholders(module.graph)]
    world = compat.symbolic_world()
    moved = [_fake(TensorSpec.of(fake), world) if isinstance(fake, Tensor) else fake for fake in fakes]
    with world.tracing():
        graph = compat.trace_graph(module, moved)
    return compat.inductor_compile(graph, moved, world.mode)


def _fake(spec: TensorSpec, world: compat.SymbolicWorld) -> Tensor:
    with world.mode:
        return torch.empty_strided(spec.shape, spec.strides, dtype=spec.dtype, device=spec.device)


def _restored(program: Program, recipe: PlanRecipe, keys: Sequence[str]) -> CompiledPlan | None:
    """The plan of an earlier process, or None where Inductor's cache has lost a part of it."""
    storage = Storage(program.fingerprint, program.device, recipe.prepare, recipe.layout, recipe.storage)
    if storage.key != recipe.storage:
        return None
    steps = []
    for step, key in zip(recipe.steps, keys, strict=True):
        try:
            artifact = _found(step, key, recipe.layout, program.device)
        except Exception as error:
            log.info("a plan on disk cannot be used and is made again: %s", repr(error))
            return None
        if artifact is None:
            return None
        steps.append(_Step(step, artifact))
    return _plan(program, recipe, storage, steps, from_disk=True)


def _found(step: StepRecipe, key: str, layout: Layout, device: torch.device) -> Artifact | None:
    if not step.coalesced:
        world = compat.symbolic_world()
        return compat.inductor_load(key, [_fake(spec, world) for spec in step.arguments], world.mode)
    for codes in step.ready.values():
        ahead.builder.begin(codes)
    space = SlotSpace.create(device, layout)
    fakes = [*space.arguments, *map(space.stacked, step.arguments)]
    return compat.inductor_load(key, fakes, space.shapes.mode)


def _plan(
    program: Program, recipe: PlanRecipe, storage: Storage, steps: Sequence[_Step], from_disk: bool
) -> CompiledPlan:
    storage.most_rows = min(storage.most_rows, *(step.recipe.rows for step in steps))
    reasons, report, outputs = recipe.reasons, recipe.report, recipe.outputs
    return CompiledPlan(program, reasons, report, storage, tuple(steps), outputs, None, from_disk)


def _lowered(program: Program, settings: Settings, name: str | None) -> CompiledPlan:
    """A new plan, kept on disk under ``name`` if there is one."""
    copy = GraphModule(program.graph, _copy_graph(program.graph))
    module = run_passes(copy, settings)
    text = module.print_readable(print_output=False)
    prepare, body = split_prepare(module)
    allow_tf32 = compat.tf32_allowed()
    reasons = mark(body, prepare, program.device, allow_tf32)
    segments = cut(body, reasons)
    if not any(segment.coalesced for segment in segments):
        return _whole(program, dict(Counter(reasons.values())))
    nodes = [node for segment in segments if segment.coalesced for node in segment.nodes]
    layout = lay_out(body, prepare, nodes)
    storage = Storage(program.fingerprint, program.device, prepare, layout)
    numbers: dict[Node, int] = {}
    for node in placeholders(body.graph):
        if node.meta[ROLE] == "input":
            numbers[node] = node.meta[INDEX]
    for segment in segments:
        for node in segment.results:
            numbers[node] = len(program.inputs) + len(numbers)
    steps = [_step(body, segment, storage, allow_tf32, numbers) for segment in segments]
    outputs = tuple(numbers[node] for node in outputs_of(body.graph) if isinstance(node, Node))
    report = _report(program, body, segments, reasons, text)
    recipe = PlanRecipe(
        storage.key,
        prepare,
        layout,
        tuple(step.recipe for step in steps),
        outputs,
        tuple(dict.fromkeys(reasons.values())),
        report,
    )
    keys = [key for step in steps if (key := compat.inductor_key(step.artifact)) is not None]
    if name is not None and len(keys) == len(steps):
        kept_plans.save(name, recipe, tuple(keys))
    return _plan(program, recipe, storage, steps, from_disk=False)


def _copy_graph(module: GraphModule) -> torch.fx.Graph:
    graph = torch.fx.Graph()
    mapping: dict[Node, Node] = {}
    for node in module.graph.nodes:
        mapping[node] = graph.node_copy(node, lambda source: mapping[source])
    return graph


def _step(
    body: GraphModule,
    segment: Segment,
    storage: Storage,
    allow_tf32: tuple[bool, bool],
    numbers: dict[Node, int],
) -> _Step:
    kernels: KernelCalls | None = None
    ready: dict[int, Any] = {}
    if segment.coalesced:
        arguments = tuple(TensorSpec.of(fake_of(node)) for node in segment.inputs)
        graph, space, fakes = trace(body, segment, storage.layout, storage.device, storage.key, allow_tf32)
        kernels = KernelCalls.of(graph, space)
        ready = kernels.begin(storage.device)
        artifact = compat.inductor_compile(graph, fakes, space.shapes.mode)
        slots, rows = space.limits()
        if min(slots, rows) < 1:
            raise ValueError(f"the compiled code fixes a symbol: {space.shapes.knowledge()}")
    else:
        single = single_slot(body, segment)
        arguments = tuple(TensorSpec.of(node.meta["val"]) for node in placeholders(single.graph))
        artifact, slots, rows = _inductor_static(single), MOST_SLOTS, MOST_ROWS
    recipe = StepRecipe(
        segment.coalesced,
        tuple(numbers[node] for node in segment.inputs),
        tuple(node.meta[INDEX] for node in segment.parameters),
        tuple(numbers[node] for node in segment.results),
        arguments,
        tuple(TensorSpec.of(fake_of(node)) for node in segment.results),
        slots,
        rows,
        kernels,
        ready,
    )
    return _Step(recipe, artifact)


def _report(
    program: Program,
    body: GraphModule,
    segments: Sequence[Segment],
    reasons: dict[Node, FallbackReason],
    text: str,
) -> PlanReport:
    calls = call_nodes(body.graph)
    kernels: dict[str, int] = {}
    for node in calls:
        name = "depthwise" if node.target is CONVOLUTION and is_depthwise(node) else _KERNELS.get(node.target)
        if name is not None and node not in reasons:
            kernels[name] = kernels.get(name, 0) + 1
    rest = len(calls) - sum(kernels.values()) - len(reasons)
    return PlanReport(
        kernels=kernels,
        fused=len(call_nodes(program.graph.graph)) - len(calls),
        inductor=rest,
        alone=len(reasons),
        counts=dict(Counter(reasons.values())),
        flops=flops(calls),
        flops_alone=flops(reasons),
        segments=tuple("coalesced" if segment.coalesced else "per instance" for segment in segments),
        graph=text,
    )

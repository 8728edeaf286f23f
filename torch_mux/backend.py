"""``torch.compile(model, backend="mux")``: the Dynamo backend and the callable that it leaves behind."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from torch_mux import compat, recording, state, together
from torch_mux.breaks import continued
from torch_mux.errors import ClosedError, MuxError, RefreshNeeded, UnknownOption
from torch_mux.quotas import current_quota
from torch_mux.types import FallbackKind, FallbackReason, TensorSpec

if TYPE_CHECKING:
    from torch_mux.lowering.family import Family
    from torch_mux.lowering.program import Program
    from torch_mux.runtime.engine import Engine

__all__ = ["Entry", "mux"]

log = logging.getLogger(__name__)


class Entry:
    """A compiled graph as Dynamo's code calls it: finds the instance by its parameters and asks the engine.

    Attributes:
        guards: what Dynamo guards in the frame, as source expressions, for the learned path.
        graph_break: whether the graph ends where the frame does not.
    """

    _boxed_call = True

    def __init__(self, program: Program, guards: tuple[str, ...], graph_break: bool) -> None:
        self._captured = program
        self._engine: Engine | None = None
        self._program = program
        self._reformed: dict[tuple[TensorSpec, ...], Entry] = {}
        self.guards = guards
        self.graph_break = graph_break

    @property
    def engine(self) -> Engine:
        """The process's engine; a new one after ``torch_mux.reset()``."""
        engine = state.engine()
        self._join(engine)
        return engine

    def _join(self, engine: Engine) -> None:
        if engine is not self._engine:
            self._program = engine.register(self._captured)
            self._engine = engine

    @property
    def program(self) -> Program:
        """The canonical program of the graph in the current engine."""
        _ = self.engine
        return self._program

    def __call__(self, args: list[object]) -> list[object]:
        """Runs one request and returns the graph's outputs; ``args`` is emptied."""
        while True:
            engine = state.engine()
            try:
                self._join(engine)
                return self._run(engine, args)
            except ClosedError:
                if not state.replaced(engine):
                    raise

    def _run(self, engine: Engine, args: list[object]) -> list[object]:
        program = self._program
        inputs, parameters = program.split(args)
        if self._reformed:
            entry = self._entry_for(parameters)
            if entry is not self:
                return entry(args)
        instance = engine.instance(program, parameters)
        quota = current_quota()
        if quota.rate is not None:
            quota = continued(quota, self.graph_break)
        request = engine.submit(instance, inputs, quota)
        assembly = together.current()
        if assembly is not None:
            assembly.arrive()
        try:
            outputs = program.visible(request.result())
        except RefreshNeeded as error:
            return self._reform(inputs, parameters, error)(args)
        recorder = recording.current()
        if recorder is not None:
            recorder.append(recording.Call(self, tuple(args), instance, tuple(outputs)))
        args.clear()
        return list(outputs)

    def _entry_for(self, parameters: Sequence[Tensor]) -> Entry:
        return self._reformed.get(tuple(map(TensorSpec.of, parameters)), self)

    def _reform(self, inputs: Sequence[object], parameters: Sequence[Tensor], error: RefreshNeeded) -> Entry:
        """The entry for weights that ``.to()`` gave other strides or types in place.

        Dynamo of torch 2.11 does not look at them again as long as the module's dicts are unchanged.
        """
        from torch_mux.lowering.capture import capture
        from torch_mux.lowering.family import Unspecialisable, specialise

        captured = self._captured
        if captured.fallback is not None or not all(isinstance(x, Tensor) for x in inputs):
            raise error
        try:
            module = specialise(captured.graph, captured.join(inputs, parameters))
        except Unspecialisable as cause:
            raise error from cause
        program = capture(module, captured.parameter_positions, captured.name)
        entry = Entry(program, self.guards, self.graph_break)
        return self._reformed.setdefault(tuple(map(TensorSpec.of, parameters)), entry)


class FamilyEntry:
    """A compiled graph with symbolic sizes: each set of sizes has an :class:`Entry` of its own."""

    _boxed_call = True

    def __init__(self, family: Family, guards: tuple[str, ...], graph_break: bool) -> None:
        self._family = family
        self._guards = guards
        self._graph_break = graph_break
        self._entries: dict[Program, Entry] = {}

    def __call__(self, args: list[object]) -> list[object]:
        """Runs one request under the program of its sizes; ``args`` is emptied."""
        program, own = self._family.member(args)
        entry = self._entries.get(program)
        if entry is None:
            entry = self._entries.setdefault(program, Entry(program, self._guards, self._graph_break))
        outputs = entry(own)
        args.clear()
        return outputs


def mux(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend behind the name "mux"; Dynamo calls it once an architecture and input signature.

    Inference graphs become programs. Training graphs, and everything while ``configure(enabled=False)``, go
    to Inductor whole.

    Raises:
        UnknownOption: ``options`` or ``mode`` were given; mux is set up with ``torch_mux.configure``.
    """
    _check(options, mode)
    owner = compat.frame_owner()
    name = type(owner).__name__ if isinstance(owner, torch.nn.Module) else compat.frame_name()
    if not state.settings().enabled:
        return compat.compile_whole(gm, example_inputs)
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs):
        _report_training(name, owner)
        return compat.compile_whole(gm, example_inputs)
    if isinstance(owner, torch.nn.Module) and any(map(_trains, owner.modules())):
        _report_train_mode(name)
    return _capture(gm, example_inputs, name, compat.frame_guards(), compat.has_graph_break(gm))


def _check(options: dict[str, Any] | None, mode: str | None) -> None:
    for name in options or ():
        error = UnknownOption(where="backend option", name=name, valid="none; use torch_mux.configure(...)")
        raise compat.unwrapped_by_dynamo(error)
    if mode not in (None, "default"):
        raise compat.unwrapped_by_dynamo(UnknownOption(where="mode", name=mode, valid="'default'"))


def _report_training(name: str, owner: object) -> None:
    state.note(FallbackReason(FallbackKind.TRAINING, name))
    if isinstance(owner, torch.nn.Module) and not owner.training:
        warnings.warn(
            f"{name} is in eval mode but grad is enabled and a parameter requires grad, so it runs in "
            "Inductor alone, outside torch_mux: call it under torch.inference_mode() or torch.no_grad()",
            stacklevel=2,
        )


def _trains(module: torch.nn.Module) -> bool:
    """Whether a module answers otherwise than in inference; most modules do not look at their mode."""
    kind = type(module).__name__
    return module.training and ("Dropout" in kind or "BatchNorm" in kind)


def _report_train_mode(name: str) -> None:
    advice = f"dropout and batch norm are not as in inference; call {name}.eval()"
    state.note(FallbackReason(FallbackKind.TRAIN_MODE, name, advice))
    warnings.warn(f"{name} is in train mode: {advice}", stacklevel=2)


def _report_eager(code: CodeType, owner: object, limit: bool) -> None:
    """Notes a frame that Dynamo leaves to eager PyTorch, and warns."""
    name = type(owner).__name__ if isinstance(owner, torch.nn.Module) else code.co_name
    if limit:
        advice = "raise torch._dynamo.config.recompile_limit and accumulated_recompile_limit"
    else:
        advice = 'TORCH_LOGS="graph_breaks" tells why'
    kind = FallbackKind.LIMIT if limit else FallbackKind.GIVEN_UP
    reason = FallbackReason(kind, name, f"{advice}; {code.co_filename}:{code.co_firstlineno}")
    state.note(reason)
    warnings.warn(f"torch_mux: {reason}; nothing of it is coalesced", stacklevel=2)


def _capture(
    gm: GraphModule, example_inputs: Sequence[Any], name: str, guards: tuple[str, ...], graph_break: bool
) -> Callable[..., Any]:
    from torch_mux.lowering import kept_programs
    from torch_mux.lowering.capture import capture
    from torch_mux.lowering.family import Family, Unspecialisable

    kept = kept_programs.name_of(gm, example_inputs) if state.settings().keep_plans else None
    found = None if kept is None else kept_programs.load(kept, name)
    if found is not None:
        log.info("%s is program %s, from disk", name, found.fingerprint[:12])
        return _unboxed(_started(Entry(found, guards, graph_break)))

    def compiler(graph: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        if compat.has_effect_tokens():
            raise _Whole(FallbackReason(FallbackKind.EFFECT, name))
        static = compat.static_input_positions()
        if compat.is_symbolic([node.meta.get("val") for node in graph.graph.nodes]):
            family = Family(graph, static, name)
            log.info("captured %s as a family of programs by sizes", name)
            return FamilyEntry(family, guards, graph_break)
        program = capture(graph, static, name)
        log.info("captured %s as program %s", name, program.fingerprint[:12])
        if kept is not None:
            kept_programs.save(kept, program)
        return Entry(program, guards, graph_break)

    try:
        return compat.aot_inference(gm, example_inputs, compiler)
    except Unspecialisable as error:
        reason = FallbackReason(FallbackKind.DYNAMIC_SHAPE, name, str(error))
    except _Whole as error:
        reason = error.reason
    return _unboxed(Entry(_whole_program(gm, example_inputs, name, reason), guards, graph_break))


class _Whole(Exception):
    """A graph that has no program of its own."""

    def __init__(self, reason: FallbackReason) -> None:
        super().__init__(str(reason))
        self.reason = reason


def _whole_program(
    gm: GraphModule, example_inputs: Sequence[Any], name: str, reason: FallbackReason
) -> Program:
    """Inductor's code for a whole graph, under the quota: its shapes depend on data, or it has effects."""
    from torch_mux.lowering.program import Program
    from torch_mux.types import TensorSpec

    static = compat.static_placeholders(gm)
    compiled = compat.compile_whole(gm, example_inputs)
    tensors = [x for x in example_inputs if isinstance(x, Tensor)]
    count = len(example_inputs)
    return Program(
        fingerprint=f"dynamic-{id(compiled):x}",
        name=name,
        device=next((x.device for x in tensors if x.device.type != "cpu"), torch.device("cpu")),
        inputs=(None,) * (count - len(static)),
        parameters=tuple(TensorSpec.of(example_inputs[i]) for i in static),
        outputs=(),
        input_positions=tuple(i for i in range(count) if i not in static),
        parameter_positions=static,
        mutates=True,
        fallback=reason,
        graph=_bare(gm),
        artifact=lambda args: compiled(*args),
    )


def _bare(gm: GraphModule) -> GraphModule:
    """The operations of a Dynamo graph without what was known while it was traced."""
    graph = torch.fx.Graph()
    mapping: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in gm.graph.nodes:
        mapping[node] = graph.node_copy(node, lambda source: mapping[source])
        mapping[node].meta = {}
    return GraphModule(gm, graph)


def _started(entry: Entry) -> Entry:
    """``entry``, whose plan is loaded from now on, beside what Dynamo still does."""
    try:
        _ = entry.engine
    except MuxError as error:  # whoever calls it is told
        log.debug("its plan is not loaded yet: %s", error)
    return entry


def _unboxed(entry: Entry) -> Callable[..., Any]:
    """``entry`` as Dynamo's code calls it; without grad, as AOTAutograd has inference graphs run."""

    def run(*args: object) -> list[object]:
        if not torch.is_grad_enabled():
            return entry(list(args))
        with torch.no_grad():
            return entry(list(args))

    return run


compat.raise_recompile_limits()
compat.install_first_call_guard(mux, _report_eager)
compat.install_tracing_check()
compat.source_keys.begin()

"""Learning a guard-free route from one real call.

The call's result is returned, never thrown away: a second call would step a model that counts twice. What
makes a route safe is what is refused; every refusal is a ``FallbackReason`` that ``explain()`` prints, and
the model stays on Dynamo's guarded path, where it is right but slower to call.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torch_mux import compat, state
from torch_mux.forms import Form, Formless, form
from torch_mux.plain import CONSTANTS
from torch_mux.recording import Call, Frame, Recorder, recorded_call, recording
from torch_mux.routes import Arranged, Route, containers, flat_positions
from torch_mux.types import FallbackKind, FallbackReason
from torch_mux.watching import Structure, Unwatchable, watches

__all__ = ["Lesson", "learn", "name_of"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Lesson:
    """What one call taught.

    Attributes:
        result: what the model returned.
        route: the learned route, or None.
        refusal: why there is none.
        calls: how many times a graph of the backend ran.
    """

    result: Any
    route: Route | None
    refusal: FallbackReason | None
    calls: int


class _Refused(Exception):
    def __init__(self, detail: str, kind: FallbackKind = FallbackKind.GUARDED) -> None:
        super().__init__(detail)
        self.kind = kind


def name_of(model: Any) -> str:
    """What to call a compiled model in reports: the class of the module, or the function's name."""
    module = compat.original_module(model)
    return (
        type(module).__name__ if module is not None else str(getattr(model, "__name__", type(model).__name__))
    )


def learn(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], arranged: Arranged) -> Lesson:
    """Calls ``model`` once on the guarded path and derives a route from what happened.

    Raises:
        whatever the model raises.
    """
    module = compat.original_module(model)
    before = _snapshot(module, arranged.leaves)
    with recording() as recorder:
        result = recorded_call(model, args, kwargs)
    try:
        _unchanged(before, module, arranged.leaves)
        route = _route(model, module, args, kwargs, arranged, recorder, result)
    except (_Refused, Unwatchable) as refused:
        kind = refused.kind if isinstance(refused, _Refused) else FallbackKind.GUARDED
        reason = FallbackReason(kind, name_of(model), str(refused))
        log.info("%s", reason)
        return Lesson(result, None, reason, len(recorder.calls))
    return Lesson(result, route, None, len(recorder.calls))


def _route(
    model: Any,
    module: nn.Module | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    arranged: Arranged,
    recorder: Recorder,
    result: Any,
) -> Route:
    call, frame = _single_call(model, module, recorder)
    reached = watches(call.entry.guards, frame, containers(args, kwargs))
    roots = reached.roots if module is None else [module, *reached.roots]
    structure = Structure.of(roots, reached.flags, _own_hooks(model, module))
    if not structure.unchanged():
        raise _Refused("a module has forward hooks")
    positions, same = flat_positions(arranged.leaves)
    taken, nesting = _results(result, call, arranged.leaves, containers(args, kwargs))
    route = Route(
        engine=call.entry.engine,
        instance=call.instance,
        spec=arranged.spec,
        state=compat.state_check(),
        tensors=positions,
        check=compat.tensor_check([arranged.leaves[position] for position in positions]),
        same=same,
        inputs=_inputs(call, arranged.leaves),
        structure=structure,
        watches=reached.watches,
        result=taken,
        nesting=nesting,
    )
    if not (route.matches(arranged) and route.holds()):
        raise _Refused(
            "its signature does not recognise its own call (a torch function or dispatch mode is active)"
        )
    return route


def _single_call(model: Any, module: nn.Module | None, recorder: Recorder) -> tuple[Call, Frame]:
    """The one run of the one graph, or a refusal."""
    if not recorder.calls:
        if (
            torch.is_grad_enabled()
            and module is not None
            and any(p.requires_grad for p in module.parameters())
        ):
            raise _Refused("call it under torch.inference_mode() or torch.no_grad()", FallbackKind.TRAINING)
        if not state.settings().enabled:
            raise _Refused("torch_mux is disabled: configure(enabled=True)")
        raise _Refused("the call never ran a graph of backend='mux'", FallbackKind.NOT_REACHED)
    if len(recorder.calls) > 1:
        raise _Refused(f"graph break: one call ran {len(recorder.calls)} graphs")
    call, frame = recorder.calls[0], recorder.frames[0]
    if call.entry.graph_break:
        raise _Refused("graph break after its graph")
    if call.instance is None:
        raise _Refused("its graph ran outside the engine")
    fallback = call.entry.program.fallback
    if fallback is not None and fallback.kind is FallbackKind.DYNAMIC_SHAPE:
        raise _Refused(f"its shapes are not static: {fallback.detail}")
    if call.entry.program.mutates:
        raise _Refused("side effect: its graph writes one of its arguments, parameters or buffers")
    if frame is None:
        raise _Refused("the frame that called the graph was not found")
    outside = next(
        (f"{name} in {file}" for file, name in frame.callers if file not in compat.caller_files()), None
    )
    if outside is not None:
        raise _Refused(f"Python runs around its graph: {outside}")
    problem = frame.objection
    if problem is not None:
        raise _Refused(problem)
    return call, frame


def _inputs(call: Call, leaves: Sequence[Any]) -> tuple[tuple[bool, Any], ...]:
    """Where every input of the program comes from: an argument leaf by identity, or a constant."""
    known = {
        id(leaf): position
        for position, leaf in reversed(list(enumerate(leaves)))
        if isinstance(leaf, torch.Tensor)
    }
    found: list[tuple[bool, Any]] = []
    inputs, parameters = call.entry.program.split(call.args)
    if any(id(parameter) in known for parameter in parameters):
        raise _Refused("an argument is one of the model's own parameters or buffers")
    for value in inputs:
        if id(value) in known:
            found.append((True, known[id(value)]))
        elif isinstance(value, (int, float, bool)):
            found.append((False, value))  # a size of the signature: the key holds every shape
        else:
            raise _Refused(
                "an input of its graph is neither an argument nor a parameter (a global or attribute tensor)"
            )
    return tuple(found)


def _results(
    result: Any, call: Call, leaves: Sequence[Any], given: Sequence[object]
) -> tuple[tuple[tuple[str, Any], ...], Form | None]:
    """Where every leaf of the result comes from, and how the leaves nest."""
    try:
        flat, nesting = form(result, given)
    except Formless as formless:
        raise _Refused(str(formless)) from None
    outputs = {
        id(value): position for position, value in enumerate(call.outputs) if isinstance(value, torch.Tensor)
    }
    arguments = {id(leaf): position for position, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
    taken: list[tuple[str, Any]] = []
    for leaf in flat:
        if id(leaf) in outputs:
            if leaf.is_inference() != torch.is_inference_mode_enabled():
                raise _Refused("the model enters or leaves inference mode itself")
            taken.append(("output", outputs[id(leaf)]))
        elif id(leaf) in arguments:
            taken.append(("argument", arguments[id(leaf)]))
        elif type(leaf) in CONSTANTS:
            taken.append(("constant", leaf))
        else:
            raise _Refused(
                "a returned tensor is a parameter, a buffer or a view that its graph did not return"
            )
    return tuple(taken), None if flat and flat[0] is result else nesting


def _own_hooks(model: Any, module: nn.Module | None) -> tuple[dict[Any, Any], ...]:
    """Hooks on the compiled wrapper itself, which run outside of any graph."""
    if isinstance(model, nn.Module) and model is not module:
        return (model._forward_hooks, model._forward_pre_hooks)
    return ()


def _snapshot(
    module: nn.Module | None, leaves: Sequence[Any]
) -> tuple[list[dict[str, Any]], list[int | None]]:
    modules = list(module.modules()) if module is not None else []
    tables = [dict(table) for m in modules for table in (m.__dict__, m._parameters, m._buffers, m._modules)]
    return tables, _versions(modules, leaves)


def _versions(modules: Sequence[nn.Module], leaves: Sequence[Any]) -> list[int | None]:
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    for module in modules:
        tensors += [tensor for tensor in module._parameters.values() if tensor is not None]
        tensors += [tensor for tensor in module._buffers.values() if tensor is not None]
    return [None if tensor.is_inference() else tensor._version for tensor in tensors]


def _unchanged(
    before: tuple[list[dict[str, Any]], list[int | None]], module: nn.Module | None, leaves: Sequence[Any]
) -> None:
    """Refuses a call that wrote an attribute, a buffer or one of its arguments."""
    tables, versions = before
    now, versions_now = _snapshot(module, leaves)
    if len(tables) != len(now):
        raise _Refused("side effect: the call added or removed a module")
    for old, new in zip(tables, now, strict=True):
        changed = [name for name in {**old, **new} if old.get(name, tables) is not new.get(name, tables)]
        if changed:
            raise _Refused(f"side effect: the call changed attribute {changed[0]!r}")
    if versions != versions_now:
        raise _Refused("side effect: the call wrote an argument, a parameter or a buffer in place")

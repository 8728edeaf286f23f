"""Dynamo: its limits, its compiled models, its checks, and the frame that it is compiling."""

from __future__ import annotations

import contextlib
import types
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch._dynamo.config as _dynamo_config
import torch.utils._contextlib
from torch._C import _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._dynamo.guards import GlobalStateGuard, TensorGuards
from torch._dynamo import eval_frame as _dynamo_eval_frame
from torch._dynamo import external_utils as _external_utils
from torch._dynamo.eval_frame import OptimizedModule
from torch._guards import TracingContext
from torch.fx import GraphModule

__all__ = [
    "active_modes",
    "caller_files",
    "compile_lock",
    "compiled_backend",
    "frame_guards",
    "frame_name",
    "frame_owner",
    "has_graph_break",
    "innermost",
    "original_module",
    "raise_recompile_limits",
    "replayed_constructors",
    "replayed_setattr",
    "state_check",
    "tensor_check",
    "unwrapped_by_dynamo",
]

_states: deque[Callable[[], bool]] = deque(maxlen=8)

RECOMPILE_LIMIT = 256
ACCUMULATED_RECOMPILE_LIMIT = 4096
_PRESENCE = ("HASATTR", "NOT_PRESENT_IN_GENERIC_DICT")
_RESUMED = "torch_dynamo_resume_in_"


def raise_recompile_limits(
    limit: int = RECOMPILE_LIMIT, accumulated: int = ACCUMULATED_RECOMPILE_LIMIT
) -> None:
    """Raise Dynamo's recompile limits for the whole process, other backends included.

    Beyond ``recompile_limit`` (8) graphs of one code object Dynamo goes silently eager: nine widths of one
    class, or nine different ``nn.Sequential`` models. What is raised is the *default*: an assignment would
    hold in the assigning thread alone on torch 2.13, and a limit that the user assigned still wins.
    """
    entries: dict[str, Any] = _dynamo_config._config  # type: ignore[attr-defined]
    for name, value in (("recompile_limit", limit), ("accumulated_recompile_limit", accumulated)):
        entries[name].default = max(entries[name].default, value)


def innermost(callback: Any) -> Any:
    """What a chain of Dynamo's callbacks ends in: the backend or its wrapper."""
    while hasattr(callback, "_torchdynamo_orig_backend"):
        callback = callback._torchdynamo_orig_backend
    return callback


def compiled_backend(model: Any) -> Any | None:
    """The Dynamo backend of a model, or None where ``torch.compile`` did not make it."""
    context = getattr(model, "dynamo_ctx", None)
    if context is None:
        wrapper = getattr(model, "_compiled_call_impl", None) if isinstance(model, torch.nn.Module) else model
        config = getattr(wrapper, "get_compiler_config", None)
        cells = getattr(config, "__closure__", None) or ()
        context = next(
            (cell.cell_contents for cell in cells if hasattr(cell.cell_contents, "callback")), None
        )
    if context is None:
        return None
    backend = innermost(context.callback)
    return getattr(backend, "compiler_fn", backend)


def original_module(model: Any) -> torch.nn.Module | None:
    """The module inside a compiled model, or None for a compiled function."""
    if isinstance(model, OptimizedModule):
        module: torch.nn.Module = model._orig_mod
        return module
    return model if isinstance(model, torch.nn.Module) else None


def state_check() -> Callable[[], bool]:
    """A check that grad mode, autocast, default dtype, determinism, TF32 and threads are as they are now.

    One that was made before and holds now says the same, and is returned: callers may compare checks by
    identity.
    """
    for known in tuple(_states):
        if known():
            return known
    check: Callable[[], bool] = GlobalStateGuard().check
    _states.append(check)
    return check


def tensor_check(tensors: Sequence[torch.Tensor]) -> Callable[..., bool]:
    """A check that tensors have the type, shape, strides, dtype, device, dispatch keys and ``requires_grad``
    that ``tensors`` have now; about 200 ns a tensor. It keeps none of them alive."""
    sizes: list[Any] = [list(tensor.shape) for tensor in tensors]
    strides: list[Any] = [list(tensor.stride()) for tensor in tensors]
    check: Callable[..., bool] = TensorGuards(
        *tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides
    ).check
    return check


def active_modes() -> int:
    """How many torch function and dispatch modes are active in this thread."""
    count: int = _len_torch_function_stack() + _len_torch_dispatch_stack()
    return count


def caller_files() -> frozenset[str]:
    """Source files of torch that may stand between a call of a compiled model and its rewritten frame."""
    modules = (torch.nn.modules.module, _dynamo_eval_frame, _external_utils, torch.utils._contextlib)
    return frozenset(str(module.__file__) for module in modules)


def frame_guards() -> tuple[str, ...]:
    """What Dynamo guards in the frame being compiled, as source expressions.

    ``hasattr(x, 'a')`` says that it matters whether ``x.a`` is there.
    Not the guards themselves: they hold captured tracebacks, and dropping one of those from the clean-up of
    another deadlocks in torch.
    """
    context = TracingContext.try_get()
    if context is None:
        return ()
    names: dict[str, None] = {}
    for guard in context.guards_context.dynamo_guards:
        names[guard.name] = None
        made: Any = guard.create_fn
        if getattr(getattr(made, "func", None), "__name__", "") in _PRESENCE:
            attribute = made.keywords.get("attr", *made.args[:1])
            names[f"hasattr({guard.name}, {attribute!r})"] = None
    return tuple(names)


def has_graph_break(gm: GraphModule) -> bool:
    """Whether the graph stops where its frame goes on."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return bool(reason is not None and reason.graph_break)


def _root_translator() -> Any:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx().output.root_tx
    except AttributeError:
        return None


def frame_owner() -> object:
    """The first argument of the outermost frame that Dynamo is compiling (``self`` of a method), or None."""
    root = _root_translator()
    if root is None:
        return None
    if root.f_code.co_filename == _external_utils.__file__:
        return root.f_locals.get("fn")  # Dynamo's wrapper around torch's own modules (nn.Sequential)
    if not root.f_code.co_argcount:
        return None
    return root.f_locals.get(root.f_code.co_varnames[0])


def frame_name() -> str:
    """The name of the outermost function that Dynamo is compiling."""
    root = _root_translator()
    if root is None:
        return "function"
    name = str(root.f_code.co_name)
    if not name.startswith(_RESUMED):
        return name
    modules = (value for value in root.f_locals.values() if isinstance(value, torch.nn.Module))
    owner = next(modules, None)
    name = name[len(_RESUMED) :].rpartition("_at_")[0] if owner is None else type(owner).__name__
    return f"{name} after a graph break"


def unwrapped_by_dynamo(error: Exception) -> Exception:
    """``error`` as one of its own class that Dynamo lets pass where it would wrap a backend's exception."""
    from torch._dynamo.exc import ShortenTraceback

    own = type(error)
    kind = types.new_class(own.__name__, (own, ShortenTraceback))
    kind.__module__ = own.__module__
    passing: Exception = cast(Any, kind).__new__(kind)
    passing.args = error.args
    passing.__dict__.update(error.__dict__, first_useful_frame=None)
    return passing


def compile_lock() -> contextlib.AbstractContextManager[object]:
    """Dynamo's own lock: neither it nor Inductor may run in two threads at once."""
    from torch._dynamo.convert_frame import compile_lock as lock

    return cast("contextlib.AbstractContextManager[object]", lock)


def replayed_setattr() -> object:
    """The function by which rewritten frames repeat attribute writes of the code they stand for."""
    import torch._dynamo.utils

    return getattr(torch._dynamo.utils, "object_setattr_ignore_descriptor", None)


def replayed_constructors() -> tuple[object, ...]:
    """The functions by which rewritten frames make objects without running their class's Python."""
    import torch._dynamo.utils

    names = ("object_new", "nn_module_new")
    found = (getattr(torch._dynamo.utils, name, None) for name in names)
    return tuple(function for function in found if function is not None)

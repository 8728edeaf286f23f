"""The only package that names private parts of torch; every function works on torch 2.11 to 2.13."""

from __future__ import annotations

from . import green, native, source_keys
from .caches import cache_folder
from .captures import (
    capturing,
    guard_synchronize,
    leave_captures_alone,
)
from .collector import SERVING, Rest, paused_collector, rest
from .cuda_graphs import Graph, Pool, captured, end_lost_capture
from .dispatch import (
    device_kernel,
    fake_tensors,
    is_fake,
)
from .driver import own_stream
from .dynamo import (
    active_modes,
    caller_files,
    compile_lock,
    compiled_backend,
    frame_guards,
    frame_name,
    frame_owner,
    has_graph_break,
    original_module,
    raise_recompile_limits,
    replayed_constructors,
    replayed_setattr,
    state_check,
    tensor_check,
    unwrapped_by_dynamo,
)
from .empties import empties
from .first_calls import (
    cache_entries,
    install_first_call_guard,
)
from .graph_state import (
    graph_state,
    input_facts,
    only_passes_on,
    public_name,
)
from .inductor import (
    SymbolicWorld,
    aot_inference,
    compile_whole,
    has_effect_tokens,
    hinted,
    inductor_compile,
    is_symbolic,
    plain_tracing,
    precision_state,
    static_input_positions,
    static_placeholders,
    symbolic_world,
    tf32_allowed,
    trace_graph,
    unset_fake_temporarily,
)
from .inductor_settings import compile_counter, inductor_settings
from .launchers import keep_launchers_apart
from .profiling import ranges
from .saved_code import (
    inductor_key,
    inductor_load,
    surroundings,
)
from .streams import (
    current_stream,
    is_capturing,
    is_current,
    is_device_error,
    on_stream,
)
from .switching import quick_switching
from .tracing import install_tracing_check
from .user_kernels import user_kernel

__all__ = [
    "SERVING",
    "Graph",
    "Pool",
    "Rest",
    "SymbolicWorld",
    "active_modes",
    "aot_inference",
    "cache_entries",
    "cache_folder",
    "caller_files",
    "captured",
    "capturing",
    "compile_counter",
    "compile_lock",
    "compile_whole",
    "compiled_backend",
    "current_stream",
    "device_kernel",
    "empties",
    "end_lost_capture",
    "fake_tensors",
    "frame_guards",
    "frame_name",
    "frame_owner",
    "graph_state",
    "green",
    "guard_synchronize",
    "has_effect_tokens",
    "has_graph_break",
    "hinted",
    "inductor_compile",
    "inductor_key",
    "inductor_load",
    "inductor_settings",
    "input_facts",
    "install_first_call_guard",
    "install_tracing_check",
    "is_capturing",
    "is_current",
    "is_device_error",
    "is_fake",
    "is_symbolic",
    "keep_launchers_apart",
    "leave_captures_alone",
    "native",
    "on_stream",
    "only_passes_on",
    "original_module",
    "own_stream",
    "paused_collector",
    "plain_tracing",
    "precision_state",
    "public_name",
    "quick_switching",
    "raise_recompile_limits",
    "ranges",
    "replayed_constructors",
    "replayed_setattr",
    "rest",
    "source_keys",
    "state_check",
    "static_input_positions",
    "static_placeholders",
    "surroundings",
    "symbolic_world",
    "tensor_check",
    "tf32_allowed",
    "trace_graph",
    "unset_fake_temporarily",
    "unwrapped_by_dynamo",
    "user_kernel",
]

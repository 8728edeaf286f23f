"""Whether the calling thread is inside a trace of ``torch.fx``."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch._dynamo.variables.torch import tracing_state_functions
from torch.fx import _symbolic_trace

__all__ = ["install_tracing_check"]


def install_tracing_check() -> None:
    """Makes ``torch.fx`` tell its traces apart by thread; once, for the whole process.

    Its flag belongs to the process: while one thread compiles, the models of other threads refuse their
    calls ("using FX to symbolically trace a dynamo-optimized function"). Models compiled with
    ``torch.compile`` from now on ask by thread. The stack is looked at only while the flag is up.
    """
    original = _symbolic_trace.is_fx_symbolic_tracing
    if getattr(original, "knows_threads", False):
        return
    trace = _symbolic_trace.Tracer.trace.__code__
    tracing_state_functions()  # cached: Dynamo goes on folding the original, which torch's modules hold

    def is_fx_symbolic_tracing() -> bool:
        if torch.compiler.is_compiling() or not original():
            return False
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_code is trace:
                return True
            frame = frame.f_back
        return False

    replacement: Any = is_fx_symbolic_tracing
    replacement.knows_threads = True
    _symbolic_trace.is_fx_symbolic_tracing = replacement

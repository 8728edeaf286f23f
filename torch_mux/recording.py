"""What one call of a compiled model did, written down while it ran.

The learned path (``torch_mux.learned``) opens a ``Recorder`` around one real call; the compiled graph's entry
appends one ``Call`` each time it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from types import CodeType
from typing import Any

from torch_mux.bytecode import rests
from torch_mux.replay import Refusal, Rest

__all__ = ["Call", "Frame", "Recorder", "current", "recording"]

_GRAPH_NAME = "__compiled_fn"


@dataclass(frozen=True, eq=False)
class Call:
    """One run of a compiled graph.

    Attributes:
        entry: the compiled callable (``torch_mux.backend.Entry``).
        args: the flat argument list of the graph.
        instance: the engine's instance of the weights among ``args``, or None outside of the engine.
        outputs: what the entry returned, in the order of the graph's outputs.
    """

    entry: Any
    args: tuple[object, ...]
    instance: Any
    outputs: tuple[object, ...]


@dataclass(frozen=True, eq=False)
class Frame:
    """The Python frame that Dynamo rewrote to call a graph.

    Attributes:
        code: the rewritten code object that is being executed.
        values: local and free variables by name when the graph was called.
        namespace: the globals of the frame.
        callers: (file, function) of every frame between the recorded call and this one, innermost first.
        objection: why the frame has to run on every call, or None. It is found out while the graph's outputs
            are on their way back, because afterwards the frame's writes have been made.
        rests: what the frame reads or writes back after its graph.
    """

    code: CodeType
    values: dict[str, object]
    namespace: dict[str, Any]
    callers: tuple[tuple[str, str], ...]
    objection: str | None = None
    rests: tuple[Rest, ...] = ()


@dataclass(eq=False)
class Recorder:
    """Collects the calls of compiled graphs made by one thread; see ``recording``."""

    calls: list[Call] = field(default_factory=list)
    frames: list[Frame | None] = field(default_factory=list)

    def append(self, call: Call) -> None:
        """Record one run; called by the entry itself, so that the rewritten frame is still on the stack."""
        self.calls.append(call)
        frame = _rewritten_frame()
        self.frames.append(None if frame is None else _read(frame))


def _read(frame: Frame) -> Frame:
    try:
        return replace(frame, rests=rests(frame.code, frame.values, frame.namespace))
    except Refusal as refusal:
        return replace(frame, objection=str(refusal))


def _rewritten_frame() -> Frame | None:
    frame = sys._getframe(2)
    while frame is not None and not any(name.startswith(_GRAPH_NAME) for name in frame.f_code.co_names):
        if frame.f_back is None:
            return None
        frame = frame.f_back
    callers = []
    outer = frame.f_back
    while outer is not None and outer.f_code is not recorded_call.__code__:
        callers.append((outer.f_code.co_filename, outer.f_code.co_name))
        outer = outer.f_back
    return Frame(frame.f_code, dict(frame.f_locals), frame.f_globals, tuple(callers))


def recorded_call(function: Any, args: Sequence[object], kwargs: dict[str, Any]) -> Any:
    """``function(*args, **kwargs)``; its frame marks where a recorded call begins."""
    return function(*args, **kwargs)


_CURRENT: ContextVar[Recorder | None] = ContextVar("torch_mux_recorder", default=None)

current = _CURRENT.get


@contextmanager
def recording() -> Iterator[Recorder]:
    """Record every run of a compiled graph in this thread until the block ends."""
    recorder = Recorder()
    token = _CURRENT.set(recorder)
    try:
        yield recorder
    finally:
        _CURRENT.reset(token)

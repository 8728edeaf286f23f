"""Does a frame that Dynamo rewrote do anything with its graph's outputs but return them?

Dynamo replays side effects (counters, list appends, attribute writes) after the graph, in the frame's
rewritten bytecode. A frame may be skipped only where nothing of that kind is there.
"""

from __future__ import annotations

import dis
import inspect
from functools import lru_cache
from types import CodeType
from typing import Any

from torch_mux.instructions import walk
from torch_mux.replay import Refusal, Replay, Rest

__all__ = ["rests"]

_GRAPH = "__compiled_fn"
_RESUME = ("__resume_at", "torch_dynamo_resume_in")
_CALLS = ("CALL", "CALL_FUNCTION", "CALL_FUNCTION_KW", "CALL_FUNCTION_EX", "CALL_METHOD", "CALL_KW")
_WRITES = frozenset(
    {
        "STORE_ATTR",
        "STORE_SUBSCR",
        "STORE_GLOBAL",
        "STORE_NAME",
        "DELETE_ATTR",
        "DELETE_SUBSCR",
        "DELETE_GLOBAL",
    }
)


def rests(code: CodeType, values: dict[str, object], namespace: dict[str, Any]) -> tuple[Rest, ...]:
    """What a rewritten frame's return rests on beyond its graph's outputs.

    Args:
        code: the rewritten code that is being executed.
        values: its local and free variables when the graph was called.
        namespace: its globals.

    Raises:
        Refusal: the frame has to run on every call; the message says why.
    """
    if any(name.startswith(_RESUME) for name in code.co_names):
        raise Refusal("graph break: the frame resumes in another one")
    instructions = _instructions(code)
    loads = [
        i
        for i, item in enumerate(instructions)
        if item.opname == "LOAD_GLOBAL" and str(item.argval).startswith(_GRAPH)
    ]
    if len(loads) != 1:
        raise Refusal(f"the frame calls {len(loads)} graphs")
    end = _call_of(instructions, loads[0])
    if end is None:
        raise Refusal("the call of the graph could not be found in the frame")
    written = next((item.opname for item in instructions[:end] if item.opname in _WRITES), None)
    if written is not None:
        raise Refusal(f"side effect: {written} before the graph runs")
    replay = Replay(values, namespace, _own_containers(code))
    walk(replay, instructions[end:])
    return tuple(replay.rests)


@lru_cache(maxsize=16)
def _instructions(code: CodeType) -> list[dis.Instruction]:
    """The instances of one architecture run one code."""
    return list(dis.get_instructions(code))


def _own_containers(code: CodeType) -> frozenset[str]:
    """The name of ``**kwargs``: a dict that every call makes anew."""
    if not code.co_flags & inspect.CO_VARKEYWORDS:
        return frozenset()
    place = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
    return frozenset({code.co_varnames[place]})


def _call_of(instructions: list[dis.Instruction], load: int) -> int | None:
    """Index after the call of what ``instructions[load]`` put on the stack."""
    depth = 0
    for index in range(load, len(instructions)):
        item = instructions[index]
        depth += dis.stack_effect(item.opcode, item.arg, jump=False)
        if index > load and item.opname in _CALLS and depth <= 1:
            return index + 1
    return None

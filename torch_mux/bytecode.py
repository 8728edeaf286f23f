"""Does a frame that Dynamo rewrote do anything with its graph's outputs but return them?

Dynamo replays side effects (counters, list appends, attribute writes) after the graph, in the frame's
rewritten bytecode. A frame may be skipped only where nothing of that kind is there.
"""

from __future__ import annotations

import builtins
import dis
from itertools import pairwise
from types import ModuleType

import torch

from torch_mux import compat
from torch_mux.recording import Frame

__all__ = ["CONSTANTS", "objection"]

CONSTANTS = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), torch.dtype, torch.device)
"""Types of values that may stand in a learned signature or result: immutable, compared by value."""

_MISSING = object()
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
_HARMLESS = frozenset(
    """
    BINARY_SLICE BINARY_SUBSCR BUILD_CONST_KEY_MAP BUILD_LIST BUILD_MAP BUILD_SLICE BUILD_TUPLE
    CACHE CALL CALL_FUNCTION CALL_FUNCTION_EX CALL_FUNCTION_KW CALL_INTRINSIC_1 COPY DELETE_FAST
    DICT_MERGE DICT_UPDATE DUP_TOP DUP_TOP_TWO EXTENDED_ARG KW_NAMES LIST_APPEND LIST_EXTEND
    LIST_TO_TUPLE LOAD_CONST NOP POP_TOP PRECALL PUSH_NULL RESUME RETURN_CONST RETURN_VALUE ROT_FOUR
    ROT_N ROT_THREE ROT_TWO STORE_FAST SWAP UNPACK_SEQUENCE
    """.split()
)
_LOADS_LOCAL = frozenset({"LOAD_FAST", "LOAD_FAST_CHECK", "LOAD_FAST_AND_CLEAR", "LOAD_FAST_LOAD_FAST"})


def objection(frame: Frame) -> str | None:
    """Why ``frame`` has to run on every call, or None where it only returns what its one graph computed."""
    if any(name.startswith(_RESUME) for name in frame.code.co_names):
        return "graph break: the frame resumes in another one"
    instructions = list(dis.get_instructions(frame.code))
    loads = [
        i
        for i, item in enumerate(instructions)
        if item.opname == "LOAD_GLOBAL" and str(item.argval).startswith(_GRAPH)
    ]
    if len(loads) != 1:
        return f"the frame calls {len(loads)} graphs"
    end = _call_of(instructions, loads[0])
    if end is None:
        return "the call of the graph could not be found in the frame"
    written = next((item.opname for item in instructions[:end] if item.opname in _WRITES), None)
    if written is not None:
        return f"side effect: {written} before the graph runs"
    return _after(frame, instructions[end:])


def _call_of(instructions: list[dis.Instruction], load: int) -> int | None:
    """Index after the call of what ``instructions[load]`` put on the stack."""
    depth = 0
    for index in range(load, len(instructions)):
        item = instructions[index]
        depth += dis.stack_effect(item.opcode, item.arg, jump=False)
        if index > load and item.opname in _CALLS and depth <= 1:
            return index + 1
    return None


def _after(frame: Frame, instructions: list[dis.Instruction]) -> str | None:
    stored: set[str] = set()
    index = 0
    targets = _write_targets(frame, instructions)
    if targets:
        problem = _changing_write(targets, instructions)
        if problem is not None:
            return problem
    while index < len(instructions):
        item = instructions[index]
        if item.opname == "LOAD_GLOBAL":
            index, problem = _global_load(frame, instructions, index, targets)
            if problem is not None:
                return problem
            continue
        if item.opname in _LOADS_LOCAL:
            names = item.argval if isinstance(item.argval, tuple) else (item.argval,)
            for name in names:
                if name not in stored and not _plain(frame.values.get(name)):
                    return f"the frame uses {name!r} after its graph"
        elif item.opname == "STORE_FAST":
            stored.add(item.argval)
        elif item.opname in _WRITES:
            return f"side effect: {item.opname} {item.argrepr}".rstrip()
        if item.opname not in _HARMLESS and item.opname not in _LOADS_LOCAL:
            return f"the frame runs Python after its graph: {item.opname} {item.argrepr}".rstrip()
        index += 1
    return None


def _follow(frame: Frame, instructions: list[dis.Instruction], index: int) -> tuple[int, object]:
    """What ``name.attr.attr`` at ``index`` is, as far as it leads through modules, and the index after it."""
    name = instructions[index].argval
    value = frame.namespace.get(name, getattr(builtins, name, None))
    index += 1
    while index < len(instructions) and instructions[index].opname in ("COPY", "STORE_FAST"):
        index += 1
    while (
        isinstance(value, ModuleType)
        and index < len(instructions)
        and instructions[index].opname in ("LOAD_ATTR", "LOAD_METHOD")
    ):
        value = getattr(value, instructions[index].argval, None)
        index += 1
    return index, value


def _global_load(
    frame: Frame, instructions: list[dis.Instruction], index: int, targets: list[object]
) -> tuple[int, str | None]:
    """Of globals only classes may be used, and ``targets``. The index after it, and an objection."""
    name = instructions[index].argval
    after, value = _follow(frame, instructions, index)
    if isinstance(value, type) or any(value is target for target in (*targets, *_setters(targets))):
        return after, None
    return after, f"the frame uses global {name!r} after its graph"


def _setters(targets: list[object]) -> tuple[object, ...]:
    return (compat.replayed_setattr(),) if targets else ()


def _write_targets(frame: Frame, instructions: list[dis.Instruction]) -> list[object]:
    """Module-level objects whose attributes the frame writes again after its graph."""
    values = [
        _follow(frame, instructions, index)[1]
        for index, item in enumerate(instructions)
        if item.opname == "LOAD_GLOBAL"
    ]
    setter = compat.replayed_setattr()
    if not any(value is setter for value in values):
        return []
    return [value for value in values if value is not setter and not isinstance(value, type)]


def _changing_write(targets: list[object], instructions: list[dis.Instruction]) -> str | None:
    """An attribute write that is more than the constant that is there already, or None."""
    written = 0
    plain = [item for item in instructions if item.opname != "EXTENDED_ARG"]
    for item, following in pairwise(plain):
        if item.opname == "LOAD_CONST" and isinstance(item.argval, str) and following.opname == "LOAD_CONST":
            written += 1
            found = [getattr(target, item.argval, _MISSING) for target in targets]
            held = [value for value in found if value is not _MISSING]
            if not held or any(value is not following.argval for value in held):
                return f"side effect: attribute {item.argval!r} is written"
    calls = sum(item.opname in _CALLS and item.arg == 3 for item in plain)
    return None if calls == written else "side effect: attributes are written after the graph"


def _plain(value: object) -> bool:
    return isinstance(value, (torch.Tensor, *CONSTANTS))

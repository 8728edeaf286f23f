"""The bytecode between a graph's call and its frame's return, read for ``replay``; Python 3.10 to 3.14.

One pass, a loop's body once: what a body may do to objects that the frame made does not depend on how often
it runs, and a write to anything else is refused where it changes something.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch_mux.replay import NULL, Known, Made, Refusal, Replay

__all__ = ["walk"]

_VERSION = sys.version_info[:2]
_IGNORED = frozenset(
    "CACHE COPY_FREE_VARS EXTENDED_ARG NOP NOT_TAKEN PRECALL RESUME LIST_TO_TUPLE GET_ITER".split()
)
_UNCOUNTED = frozenset("PRECALL FOR_ITER JUMP_BACKWARD JUMP_ABSOLUTE END_FOR POP_ITER RETURN_CONST".split())
"""Instructions whose effect on the stack depends on the way taken, or is counted elsewhere."""


def walk(replay: Replay, instructions: Sequence[dis.Instruction]) -> None:
    """Walks ``instructions`` up to the return.

    Raises:
        Refusal: they do something that a learned call may not leave out.
    """
    walker = _Walker(replay)
    for item in instructions:
        if walker.returned:
            return
        depth = len(walker.stack)
        try:
            walker.step(item)
        except IndexError:
            raise Refusal(f"its frame was not understood at {item.opname}") from None
        walker.check(item, depth)
    if not walker.returned:
        raise Refusal("its frame was not understood: it does not return")


class _Walker:
    def __init__(self, replay: Replay) -> None:
        self.replay = replay
        self.stack: list[Any] = [Made()]
        self.keywords: tuple[str, ...] = ()
        self.loops: list[list[Any]] = []
        self.ended = False
        self.returned = False

    def step(self, item: dis.Instruction) -> None:
        """One instruction."""
        name = item.opname
        if self.ended and name in ("END_FOR", "POP_ITER", "POP_TOP"):
            # The loop's values went with the jump back; 3.13 pops its iterator by a POP_TOP of its own.
            self.ended = name == "END_FOR" and _VERSION >= (3, 13)
            return
        self.ended = False
        if name in _IGNORED:
            return
        handler = _HANDLERS.get(name)
        if handler is None:
            effect = "side effect" if name.startswith(("STORE", "DELETE")) else "Python"
            raise Refusal(f"{effect} after its graph: {name} {item.argrepr}".rstrip())
        handler(self, item)

    def check(self, item: dis.Instruction, depth: int) -> None:
        """Two counts of the stack's depth that differ mean that an instruction was misread."""
        if item.opname in _UNCOUNTED or self.returned or self.ended:
            return
        effect = dis.stack_effect(item.opcode, item.arg, jump=False)
        if item.opname == "CALL" and _VERSION == (3, 11):
            effect -= item.arg or 0  # PRECALL has the other part of it
        if item.opname not in ("END_FOR", "POP_TOP") and len(self.stack) - depth != effect:
            raise Refusal(f"its frame was not understood at {item.opname}")

    def pop(self, count: int) -> list[Any]:
        """The last ``count`` values, in order."""
        if count > len(self.stack):
            raise IndexError
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def push_callable(self, value: Any) -> None:
        """A value and the empty slot beside it."""
        self.stack += [value, NULL] if _VERSION >= (3, 13) else [NULL, value]

    def call(self, args: list[Any], keywords: Sequence[str] = ()) -> None:
        """Calls what lies on the stack, with or without an empty slot beside it."""
        one, other = self.pop(2)
        if one is not NULL and other is not NULL:
            args = [other, *args]
        self.stack.append(self.replay.call(other if one is NULL else one, args, keywords))


def _load_const(walker: _Walker, item: dis.Instruction) -> None:
    walker.stack.append(Known(item.argval))


def _load_fast(walker: _Walker, item: dis.Instruction) -> None:
    for name in item.argval if isinstance(item.argval, tuple) else (item.argval,):
        walker.stack.append(walker.replay.named(name))


def _store_fast(walker: _Walker, item: dis.Instruction) -> None:
    for name in item.argval if isinstance(item.argval, tuple) else (item.argval,):
        walker.replay.names[name] = walker.stack.pop()


def _store_fast_load_fast(walker: _Walker, item: dis.Instruction) -> None:
    stored, loaded = item.argval
    walker.replay.names[stored] = walker.stack.pop()
    walker.stack.append(walker.replay.named(loaded))


def _delete_fast(walker: _Walker, item: dis.Instruction) -> None:
    walker.replay.names.pop(item.argval, None)


def _load_global(walker: _Walker, item: dis.Instruction) -> None:
    value = walker.replay.globe(item.argval)
    if _VERSION >= (3, 11) and (item.arg or 0) & 1:
        walker.push_callable(value)
    else:
        walker.stack.append(value)


def _load_attr(walker: _Walker, item: dis.Instruction) -> None:
    value = walker.replay.load(walker.stack.pop(), item.argval)
    if item.opname == "LOAD_METHOD" or (_VERSION >= (3, 12) and (item.arg or 0) & 1):
        walker.push_callable(value)
    else:
        walker.stack.append(value)


def _store_attr(walker: _Walker, item: dis.Instruction) -> None:
    value, target = walker.pop(2)
    walker.replay.set_attribute(target, item.argval, value, raw=False)


def _store_global(walker: _Walker, item: dis.Instruction) -> None:
    walker.replay.set_global(item.argval, walker.stack.pop())


def _store_subscr(walker: _Walker, item: dis.Instruction) -> None:
    value, target, key = walker.pop(3)
    walker.replay.set_item(target, key, value)


def _subscript(walker: _Walker, item: dis.Instruction) -> None:
    if item.opname == "BINARY_OP" and item.argrepr != "[]":
        raise Refusal(f"Python after its graph: BINARY_OP {item.argrepr}")
    target, key = walker.pop(2)
    walker.stack.append(walker.replay.subscript(target, key))


def _build_slice(walker: _Walker, item: dis.Instruction) -> None:
    bounds = walker.pop(item.arg or 0)
    whole = all(isinstance(bound, Known) and bound.value is None for bound in bounds)
    walker.stack.append(slice(None) if whole else Made())


def _build(kind: type) -> Callable[[_Walker, dis.Instruction], None]:
    def build(walker: _Walker, item: dis.Instruction) -> None:
        values = [walker.replay.plain(value) for value in walker.pop(item.arg or 0)]
        walker.stack.append(Made(kind, values))

    return build


def _build_map(walker: _Walker, item: dis.Instruction) -> None:
    flat = walker.pop(2 * (item.arg or 0))
    keys, values = flat[::2], [walker.replay.plain(value) for value in flat[1::2]]
    walker.stack.append(_mapping(keys, values))


def _build_const_key_map(walker: _Walker, item: dis.Instruction) -> None:
    keys = walker.stack.pop()
    values = [walker.replay.plain(value) for value in walker.pop(item.arg or 0)]
    walker.stack.append(_mapping([Known(key) for key in keys.value], values))


def _mapping(keys: list[Any], values: list[Any]) -> Made:
    if not all(isinstance(key, Known) for key in keys):
        return Made(dict)
    return Made(dict, [(key.value, value) for key, value in zip(keys, values, strict=True)])


def _fill(count: int) -> Callable[[_Walker, dis.Instruction], None]:
    """``LIST_APPEND`` and its like: ``count`` values from the stack into a container below them."""

    def fill(walker: _Walker, item: dis.Instruction) -> None:
        values = walker.pop(count)
        target = walker.stack[-(item.arg or 0)]
        if not isinstance(target, Made) or target.kind not in (list, dict, set):
            raise Refusal(f"side effect: {item.opname} on something that was there before")
        for value in values:
            walker.replay.plain(value)
        target.items = None

    return fill


def _intrinsic(walker: _Walker, item: dis.Instruction) -> None:
    if item.argrepr not in ("INTRINSIC_LIST_TO_TUPLE", ""):
        raise Refusal(f"Python after its graph: {item.opname} {item.argrepr}")
    value = walker.stack.pop()
    walker.stack.append(Made(tuple, value.items if isinstance(value, Made) else None))


def _unpack(walker: _Walker, item: dis.Instruction) -> None:
    value, count = walker.stack.pop(), item.arg or 0
    if not isinstance(value, Made):
        raise Refusal("the frame unpacks something after its graph")
    known = value.items if value.kind in (list, tuple) and value.items is not None else None
    walker.stack += reversed(known) if known is not None else [Made() for _ in range(count)]


def _call(walker: _Walker, item: dis.Instruction) -> None:
    keywords, walker.keywords = walker.keywords, ()
    walker.call(walker.pop(item.arg or 0), keywords)


def _kw_names(walker: _Walker, item: dis.Instruction) -> None:
    walker.keywords = item.argval if isinstance(item.argval, tuple) else ("",)


def _call_kw(walker: _Walker, item: dis.Instruction) -> None:
    names = walker.stack.pop()
    args = walker.pop(item.arg or 0)
    if item.opname == "CALL_FUNCTION_KW":
        walker.stack.append(walker.replay.call(walker.stack.pop(), args, names.value))
    else:
        walker.call(args, names.value)


def _call_function(walker: _Walker, item: dis.Instruction) -> None:
    args = walker.pop(item.arg or 0)
    walker.stack.append(walker.replay.call(walker.stack.pop(), args))


def _call_function_ex(walker: _Walker, item: dis.Instruction) -> None:
    args = walker.pop(2 if _VERSION >= (3, 14) or (item.arg or 0) & 1 else 1)
    args = [value for value in args if value is not NULL]
    if _VERSION < (3, 11):
        walker.stack.append(walker.replay.call(walker.stack.pop(), args, ("",)))
    else:
        walker.call(args, ("",))


def _copy(walker: _Walker, item: dis.Instruction) -> None:
    depth = 1 if item.opname == "DUP_TOP" else item.arg or 0
    walker.stack.append(walker.stack[-depth])


def _dup_top_two(walker: _Walker, item: dis.Instruction) -> None:
    walker.stack += [walker.stack[-2], walker.stack[-1]]


def _swap(walker: _Walker, item: dis.Instruction) -> None:
    stack, depth = walker.stack, item.arg or 0
    stack[-1], stack[-depth] = stack[-depth], stack[-1]


def _rotate(walker: _Walker, item: dis.Instruction) -> None:
    depth = {"ROT_TWO": 2, "ROT_THREE": 3, "ROT_FOUR": 4}.get(item.opname, item.arg or 0)
    walker.stack.insert(len(walker.stack) - depth, walker.stack.pop())


def _for_iter(walker: _Walker, item: dis.Instruction) -> None:
    if not isinstance(walker.stack[-1], Made):
        raise Refusal("the frame loops over something after its graph")
    walker.loops.append(walker.stack[:-1])
    walker.stack.append(Made())


def _jump_back(walker: _Walker, item: dis.Instruction) -> None:
    walker.stack[:] = walker.loops.pop()
    walker.ended = _VERSION >= (3, 12)


def _pop(walker: _Walker, item: dis.Instruction) -> None:
    walker.stack.pop()


def _push_null(walker: _Walker, item: dis.Instruction) -> None:
    walker.stack.append(NULL)


def _return(walker: _Walker, item: dis.Instruction) -> None:
    walker.replay.finish(Known(item.argval) if item.opname == "RETURN_CONST" else walker.stack.pop())
    walker.returned = True


_HANDLERS: dict[str, Callable[[_Walker, dis.Instruction], None]] = {
    **dict.fromkeys(("LOAD_CONST", "LOAD_SMALL_INT"), _load_const),
    **dict.fromkeys(("LOAD_FAST", "LOAD_FAST_CHECK", "LOAD_FAST_BORROW", "LOAD_FAST_LOAD_FAST"), _load_fast),
    "LOAD_FAST_BORROW_LOAD_FAST_BORROW": _load_fast,
    **dict.fromkeys(("STORE_FAST", "STORE_FAST_STORE_FAST"), _store_fast),
    "STORE_FAST_LOAD_FAST": _store_fast_load_fast,
    "DELETE_FAST": _delete_fast,
    "LOAD_GLOBAL": _load_global,
    **dict.fromkeys(("LOAD_ATTR", "LOAD_METHOD"), _load_attr),
    "STORE_ATTR": _store_attr,
    "STORE_GLOBAL": _store_global,
    "STORE_SUBSCR": _store_subscr,
    **dict.fromkeys(("BINARY_SUBSCR", "BINARY_OP"), _subscript),
    "BUILD_SLICE": _build_slice,
    "BUILD_LIST": _build(list),
    "BUILD_TUPLE": _build(tuple),
    "BUILD_SET": _build(set),
    "BUILD_MAP": _build_map,
    "BUILD_CONST_KEY_MAP": _build_const_key_map,
    **dict.fromkeys(("LIST_APPEND", "LIST_EXTEND", "SET_ADD", "SET_UPDATE"), _fill(1)),
    **dict.fromkeys(("DICT_UPDATE", "DICT_MERGE"), _fill(1)),
    "MAP_ADD": _fill(2),
    "CALL_INTRINSIC_1": _intrinsic,
    "UNPACK_SEQUENCE": _unpack,
    **dict.fromkeys(("CALL", "CALL_METHOD"), _call),
    "CALL_FUNCTION": _call_function,
    "KW_NAMES": _kw_names,
    **dict.fromkeys(("CALL_KW", "CALL_FUNCTION_KW"), _call_kw),
    "CALL_FUNCTION_EX": _call_function_ex,
    **dict.fromkeys(("COPY", "DUP_TOP"), _copy),
    "DUP_TOP_TWO": _dup_top_two,
    "SWAP": _swap,
    **dict.fromkeys(("ROT_TWO", "ROT_THREE", "ROT_FOUR", "ROT_N"), _rotate),
    "FOR_ITER": _for_iter,
    **dict.fromkeys(("JUMP_BACKWARD", "JUMP_ABSOLUTE"), _jump_back),
    "POP_TOP": _pop,
    "PUSH_NULL": _push_null,
    **dict.fromkeys(("RETURN_VALUE", "RETURN_CONST"), _return),
}

"""Faults at named points of an engine: what stands behind the point is replaced for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

__all__ = ["POINTS", "always", "injected", "once"]

#: Point: (what it belongs to, its method). An executor's methods are all that touch a device.
POINTS = {
    "launch": ("executor", "launch"),
    "land": ("executor", "reap"),
    "mark": ("executor", "mark"),
    "join": ("executor", "join"),
    "decide": ("policy", "form"),
    "issued": ("policy", "issued"),
    "compile": ("compiler", "compile_plan"),
}
#: Called with the real method and its arguments; returns what the method would, or raises.
Fault = Callable[..., Any]


@contextmanager
def injected(engine: Any, point: str, fault: Fault) -> Iterator[list[int]]:
    """Has ``fault(real, *arguments)`` called at a point; yields a list that grows with each call."""
    owner, method = POINTS[point]
    (dispatcher,) = engine._dispatchers.values()
    target = engine._compiler if owner == "compiler" else getattr(dispatcher, owner)
    real, calls = getattr(target, method), []

    def stand_in(*arguments: Any) -> Any:
        calls.append(len(calls))
        return fault(real, *arguments)

    with mock.patch.object(target, method, stand_in):
        yield calls


def always(error: BaseException) -> Fault:
    """Raises every time."""

    def fault(real: Any, *arguments: Any) -> Any:
        raise error

    return fault


def once(error: BaseException) -> Fault:
    """Raises the first time only."""
    left = [error]

    def fault(real: Any, *arguments: Any) -> Any:
        if left:
            raise left.pop()
        return real(*arguments)

    return fault

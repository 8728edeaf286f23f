"""Who sees the launches of a thread before they happen: they may be noted, changed, or left to somebody.

Imports no Triton, so that it can be used where there is none.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Union

from torch_mux.lowering.kernels.operation import Operation

if TYPE_CHECKING:
    from torch_mux.lowering.kernels.common import Launch

__all__ = [
    "Take",
    "Turn",
    "Work",
    "handed",
    "intercepted",
    "intercepting",
    "left_while_handed",
    "noticed",
    "recording",
]


@dataclass(frozen=True)
class Turn:
    """A place in a run where no kernel of ours is launched: an operation of the CPU is about to begin."""

    operation: Operation


Work = Union["Launch", Turn]
#: Gets each piece of work; returns what is to be done in its place, or None if it is done already.
Take = Callable[[Work], Work | None]


class _Hook(threading.local):
    take: Take | None = None


_hook: Final = _Hook()


@contextlib.contextmanager
def intercepted(take: Take) -> Iterator[None]:
    """``take`` gets what this thread is about to launch inside."""
    before, _hook.take = _hook.take, take
    try:
        yield
    finally:
        _hook.take = before


def intercepting() -> bool:
    """Whether somebody would see this thread's work."""
    return _hook.take is not None


def handed(work: Work) -> Work | None:
    """What is to be done instead of ``work``, None if nothing is left to do."""
    take = _hook.take
    return work if take is None else take(work)


@contextlib.contextmanager
def noticed(see: Callable[[Work], object]) -> Iterator[None]:
    """``see`` is told of what this thread is about to launch inside, before whoever intercepts it gets it."""
    outer = _hook.take

    def take(work: Work) -> Work | None:
        see(work)
        return work if outer is None else outer(work)

    with intercepted(take):
        yield


@contextlib.contextmanager
def left_while_handed(context: Callable[[], contextlib.AbstractContextManager[object]]) -> Iterator[None]:
    """Inside ``context``, but for the time that somebody has what this thread hands him."""
    outer = _hook.take
    with contextlib.ExitStack() as stack:
        stack.enter_context(context())

        def take(work: Work) -> Work | None:
            stack.close()
            try:
                return work if outer is None else outer(work)
            finally:
                stack.enter_context(context())

        with intercepted(take):
            yield


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Launches that this thread runs inside are noted in the list and not launched."""
    found: list[Launch] = []

    def note(work: Work) -> None:
        if not isinstance(work, Turn):
            found.append(work)

    with intercepted(note):
        yield found

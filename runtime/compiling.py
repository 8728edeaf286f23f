"""Has plans made, on the compile thread."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING
from weakref import ReferenceType

import torch

from torch_mux import compat
from torch_mux.lowering.program import Program
from torch_mux.settings import Settings
from torch_mux.types import FallbackKind, FallbackReason

if TYPE_CHECKING:
    from torch_mux.lowering.plan import CompiledPlan
    from torch_mux.runtime.executors.base import Executor
    from torch_mux.runtime.served import ServedProgram

__all__ = ["CompilePlan", "Compiler"]

logger = logging.getLogger(__name__)

CompilePlan = Callable[[Program, Settings], "CompiledPlan"]


class Compiler:
    """Compiles the plans of programs.

    Args:
        compile_plan: lowering's ``compile_plan`` unless given.
        lock: held while a plan compiles.
    """

    def __init__(
        self,
        compile_plan: CompilePlan | None,
        lock: contextlib.AbstractContextManager[object],
        settings: Callable[[], Settings],
        clock: Callable[[], float],
    ) -> None:
        self.compile_plan = compile_plan
        self._lock = lock
        self._settings = settings
        self._clock = clock

    def first(self, served: ServedProgram) -> None:
        """The plan of a program, or why there is none."""
        executor, started = served.dispatcher.executor, self._clock()
        with compat.quick_switching():
            self._make(served, executor)
        served.finished(self._clock() - started)

    def _make(self, served: ServedProgram, executor: Executor) -> None:
        try:
            plan = served.plan = self._plan(served.program)
            if plan.coalesced:
                executor.rehearse(served)
            served.slots = min(executor.slots(served.program), plan.max_slots) if plan.coalesced else 1
            served.work = plan.work
            served.coalesced = plan.coalesced
        except BaseException as error:
            # Whatever it was, callers wait for the outcome.
            logger.exception("%s did not compile", served.program.name)
            served.error = error if isinstance(error, Exception) else RuntimeError(repr(error))
        else:
            kind = "coalesced" if plan.coalesced else "per instance"
            logger.debug("%s is ready, %s", served.program.name, kind)

    def detour(self, served: ReferenceType[ServedProgram], reason: FallbackReason) -> None:
        """The per-instance plan of a program, if it is still there, whose own plan is to be retired."""
        found = served()
        if found is None:
            return
        try:
            found.detour = self._plan(replace(found.program, fallback=reason))
        except Exception as error:
            logger.exception("%s has no plan to fall back to", found.program.name)
            detail = f"of the plan to fall back to: {type(error).__name__}: {error}"
            found.stuck = FallbackReason(FallbackKind.COMPILE_FAILED, found.program.name, detail)

    def _plan(self, program: Program) -> CompiledPlan:
        with compat.paused_collector():
            plan = self._found(program)
            if plan is None:
                with self._lock:
                    plan = self._compiled(program)
            if program.device.type == "cuda":
                # Tables and constants were written on this thread's stream; lanes do not wait for it.
                torch.cuda.current_stream(program.device).synchronize()
        return plan

    def _found(self, program: Program) -> CompiledPlan | None:
        """What an earlier process left, while others compile."""
        if self.compile_plan is not None:
            return None
        from torch_mux.lowering.plan import find_plan

        try:
            return find_plan(program, self._settings())
        except Exception:  # it is made anew
            logger.warning("the plan of %s on disk is of no use", program.name, exc_info=True)
            return None

    def _compiled(self, program: Program) -> CompiledPlan:
        if self.compile_plan is not None:
            return self.compile_plan(program, self._settings())
        from torch_mux.lowering.plan import compile_plan

        return compile_plan(program, self._settings())

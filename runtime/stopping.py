"""How an engine's programs and threads end once nobody can reach them any more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch_mux.lowering.kernels.ahead import builder
from torch_mux.runtime.compile_thread import CompileThread
from torch_mux.runtime.dispatch import Dispatcher
from torch_mux.runtime.forecasts import Forecasts
from torch_mux.runtime.served import ServedProgram

__all__ = ["Remains"]

_JOIN = 5.0


@dataclass(frozen=True)
class Remains:
    """What an engine was until it was closed or reset."""

    compile_thread: CompileThread
    dispatchers: Sequence[Dispatcher]
    programs: Sequence[ServedProgram]
    forecasts: Forecasts

    def stop(self) -> None:
        """Serves what can still run, fails the rest and ends the threads."""
        self.compile_thread.close(0.0)
        builder.close(0.0)  # the compile thread may wait for it
        for dispatcher in self.dispatchers:
            dispatcher.close(_JOIN)
        self.forecasts.close()
        for one in self.programs:
            one.dispatcher.executor.forget(one)
            for instance in one.instances:
                instance.free()
        self.compile_thread.close(_JOIN)
        builder.close(_JOIN)
        for one in self.programs:
            one.let_go()

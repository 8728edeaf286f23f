"""The engine: programs, instances and requests of one process, over one dispatcher a device."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from torch_mux import compat
from torch_mux.errors import ClosedError, MemoryQuotaExceeded, ModelRemoved, Refused
from torch_mux.lowering.program import Program
from torch_mux.runtime import leaving
from torch_mux.runtime.accounting import Accounting, StatsSnapshot
from torch_mux.runtime.admission import Admission, Refusals
from torch_mux.runtime.compile_thread import CompileThread, Rank
from torch_mux.runtime.compiling import CompilePlan, Compiler
from torch_mux.runtime.dispatch import Dispatcher
from torch_mux.runtime.executors.base import Executor
from torch_mux.runtime.executors.make import make_executor
from torch_mux.runtime.forecasts import Forecasts
from torch_mux.runtime.gaps import Gaps
from torch_mux.runtime.health import EngineHealth
from torch_mux.runtime.instance import Instance
from torch_mux.runtime.memory import MemoryLedger
from torch_mux.runtime.mixes import MixReport
from torch_mux.runtime.report import ProgramReport, report_of
from torch_mux.runtime.request import Request, by_dispatcher
from torch_mux.runtime.scheduler.base import Policy
from torch_mux.runtime.scheduler.isolation import IsolatingPolicy
from torch_mux.runtime.scheduler.predictor import Predictor
from torch_mux.runtime.served import ServedProgram, outdate
from torch_mux.runtime.stopping import Remains
from torch_mux.runtime.submission import Call, Submission
from torch_mux.settings import Settings
from torch_mux.types import Quota

__all__ = ["Engine"]

logger = logging.getLogger(__name__)

MakeExecutor = Callable[["Engine", torch.device], Executor]


class Engine:
    """Serves the requests of many models; safe from any thread.

    Args:
        settings: see :meth:`configure`.
        clock: seconds, increasing; arrivals, waits and latencies are measured on it.
        compile_plan: lowering's ``compile_plan`` unless given; called on the compile thread only.
        compile_lock: held while a plan compiles or is captured.
        policy: makes the scheduling policy of a device.
        executor: makes the executor of a device.
        forecasts: folder in which measured bundle times are kept; None keeps them for this engine only.
    """

    def __init__(
        self,
        settings: Settings,
        clock: Callable[[], float] = time.perf_counter,
        *,
        compile_plan: CompilePlan | None = None,
        compile_lock: contextlib.AbstractContextManager[object] | None = None,
        policy: Callable[[Predictor], Policy] = IsolatingPolicy,
        executor: MakeExecutor | None = None,
        forecasts: Path | None = None,
    ) -> None:
        self.settings = settings
        self.clock = clock
        self.compile_lock = threading.RLock() if compile_lock is None else compile_lock
        self._compiler = Compiler(compile_plan, self.compile_lock, lambda: self.settings, clock)
        self._policy = policy
        self._folder = forecasts
        self._make_executor = make_executor if executor is None else executor
        self._lock = threading.RLock()
        self._closed = False
        self._start()
        leaving.watch(self)

    def _start(self) -> None:
        """Begins anew with nothing: what was there before goes on without knowing, until it is stopped."""
        self._memory = MemoryLedger(self._instances, self._pools)
        self._accounting = Accounting(self._memory, lambda: self.settings.quarantine)
        self._admission = gate = Admission(self._accounting, self._memory.owns)
        self._submission = Submission(gate, self._memory, self.clock, self._catch_up)
        self._forecasts = Forecasts(self._folder)
        self.compile_thread = CompileThread(interval=self._interval, serves=self._serves)
        self._gaps = Gaps(self._idle, compat.rest, self.clock)
        self._dispatchers: dict[torch.device, Dispatcher] = {}
        self._served: dict[str, ServedProgram] = {}

    def _interval(self) -> float:
        """For which compiling keeps the interpreter; where nobody is served, nobody has to wait."""
        return self.settings.switch_interval if self._serves() else 0.0

    def _serves(self) -> bool:
        """Whether a bundle went out within the last second."""
        return any(dispatcher.serves() for dispatcher in list(self._dispatchers.values()))

    def _idle(self) -> float:
        """Seconds for which no device has had anything to do, nor the compile thread; else negative."""
        if self.compile_thread.busy:
            return -1.0
        return min([dispatcher.idle() for dispatcher in list(self._dispatchers.values())], default=-1.0)

    def _follow(self) -> None:
        """Who collects Python's garbage is as the settings say, while something is served."""
        if self._gaps.follow(self.settings.collector == "idle" and bool(self._dispatchers)):
            for dispatcher in self._dispatchers.values():
                dispatcher.service.poke_from_anywhere()

    # Programs and instances.

    def register(self, program: Program) -> Program:
        """The program under which equal ones are served: the first of that fingerprint. Starts its compile.

        Raises:
            ClosedError: the engine was closed.
        """
        return self._find(program).program

    def _find(self, program: Program) -> ServedProgram:
        served = self._served.get(program.fingerprint)
        if served is not None:
            return served
        try:
            return self._enter(program)
        except ClosedError:
            leaving.wait_if_leaving()
            raise

    def _enter(self, program: Program) -> ServedProgram:
        with self._lock:
            if self._closed:
                raise ClosedError
            served = self._served.get(program.fingerprint)
            if served is None:
                served = ServedProgram(program, self._dispatcher(program.device), self._memory)
                self._served[program.fingerprint] = served
                detour = partial(self._compiler.detour, weakref.ref(served))
                served.make_detour = lambda reason: self.compile_thread.submit(partial(detour, reason))
                self.compile_thread.submit(partial(self._compiler.first, served), Rank.URGENT)
            return served

    def _dispatcher(self, device: torch.device) -> Dispatcher:
        dispatcher = self._dispatchers.get(device)
        if dispatcher is None:
            executor = self._make_executor(self, device)
            policy = self._policy(self._forecasts.predictor(device))
            dispatcher = Dispatcher(executor, policy, self.clock, self.settings, self._accounting, self._gaps)
            self._dispatchers[device] = dispatcher
            self._follow()
        return dispatcher

    def instance(self, program: Program, parameters: Sequence[Tensor]) -> Instance:
        """The instance whose parameters and buffers are these very tensors; a new one if they are unknown.

        Raises:
            ClosedError: the engine was closed.
            ModelRemoved: it was removed.
        """
        served = self._find(program)
        found = served.instances.find(parameters)
        if found is None:
            found = self._new_instance(served, parameters)
        if found.removed:
            raise ModelRemoved(model=program.name)
        return found

    def _new_instance(self, served: ServedProgram, parameters: Sequence[Tensor]) -> Instance:
        dispatcher = served.dispatcher
        with self._lock:
            found = served.instances.find(parameters)
            if found is None:
                found = Instance(served, parameters, dispatcher.died)
                served.instances.add(found)
                self.compile_thread.stir()
                outdate(self._served.values(), served, parameters)
                if parameters:
                    dispatcher.service.start()
                logger.debug("instance %d of %s", len(served.instances), served.program.name)
        return found

    def _instances(self) -> list[Instance]:
        return [instance for served in list(self._served.values()) for instance in served.instances]

    def _pools(self) -> list[tuple[torch.device, int]]:
        return [(device, found.executor.pool_bytes()) for device, found in list(self._dispatchers.items())]

    def refresh(self, parameters: Sequence[Tensor]) -> None:
        """Has every instance that uses one of these tensors prepared again before its next run."""
        identities = frozenset(map(id, parameters))
        for instance in self._instances():
            if instance.uses_any(identities):
                instance.renew = True

    def remove(self, parameters: Sequence[Tensor]) -> None:
        """Forgets the instances whose tensors are all among these; earlier requests are still served."""
        identities = frozenset(map(id, parameters))
        found = [instance for instance in self._instances() if instance.uses_only(identities)]
        for dispatcher in list(self._dispatchers.values()):
            mine = [instance for instance in found if instance.served.dispatcher is dispatcher]
            if mine:
                dispatcher.retire(mine)

    def restore(self, parameters: Sequence[Tensor]) -> None:
        """Undoes :meth:`remove`: the next request of such an instance finds it new."""
        identities = frozenset(map(id, parameters))
        with self._lock:
            for instance in self._instances():
                if instance.removed and instance.uses_only(identities):
                    instance.served.instances.discard(instance)

    # Requests.

    def submit(
        self, instance: Instance, inputs: Sequence[object], quota: Quota, kick: bool = False
    ) -> Request:
        """Queues one request and returns at once; see :meth:`submit_all`."""
        try:
            return self.submit_all([(instance, inputs, quota)], kick)[0]
        except (Refused, MemoryQuotaExceeded):
            self._accounting.refused(quota)
            raise

    def submit_all(
        self,
        calls: Sequence[Call],
        kick: bool = False,
        checked: bool = False,
        refused: Refusals | None = None,
    ) -> list[Request]:
        """Queues requests together: none goes out before all of a device are queued. Never waits.

        Outputs are allocated here, on the caller's stream and in the caller's inference mode. Nothing goes
        out until somebody waits for it, dispatches for others, or :meth:`kick` is called.

        Args:
            calls: (instance, the program's inputs in order, quota) each.
            kick: has them sent out though nobody waits for them.
            checked: the inputs are known to be where their programs run.
            refused: where it is given, requests that could not meet their deadline are noted in it, by index,
                and all others are queued and returned.

        Raises:
            ClosedError: the engine was closed.
            DeviceMismatch: an input is not where its program runs; nothing was queued then.
            ModelRemoved: an instance was removed or its model was collected.
            Refused, MemoryQuotaExceeded: a limit of a quota says no; nothing was queued then.
            InvalidQuota: the reserves of all tenants add up to more than 1; nothing was queued then.
            ExecutionFailed: there was no memory for the outputs of a request; nothing was queued then.
        """
        while True:
            submission = self._submission  # first: instances of an earlier one are marked before it changes
            live = calls
            if [one for one, _, _ in calls if one.removed or one.dropped or not one.alive]:
                live = [(self._live(instance), inputs, quota) for instance, inputs, quota in calls]
            if not checked:
                for instance, inputs, _ in live:
                    instance.served.check(inputs)
            try:
                return submission.queue(live, kick, refused)
            except ClosedError:
                if submission is not self._submission:
                    continue  # the engine was reset meanwhile
                leaving.wait_if_leaving()
                raise

    def _live(self, instance: Instance) -> Instance:
        """An instance that can be used: another one for one that was handed out before a reset."""
        if not (instance.removed or instance.dropped) and instance.alive:
            return instance
        program = instance.served.program
        if self._closed:
            leaving.wait_if_leaving()
            raise ClosedError
        if instance.removed or not instance.alive:
            raise ModelRemoved(model=program.name)
        return self.instance(program, instance.current())

    def wait(self, requests: Sequence[Request]) -> None:
        """Blocks until these have gone out, dispatching for everybody pending meanwhile if nobody else does.

        The caller's current stream waits for them. Their errors stay with them; see :meth:`Request.result`.
        """
        for dispatcher, own in by_dispatcher(requests):
            dispatcher.wait(own)
            dispatcher.executor.join(own)

    def kick(self) -> None:
        """Has what is queued sent out by the dispatchers' own threads."""
        for dispatcher in list(self._dispatchers.values()):
            dispatcher.kick()

    def call(self, program: Program, args: Sequence[object], quota: Quota) -> list[object]:
        """One blocking request from the graph's flat arguments; returns the graph's outputs in order.

        Raises:
            MuxError: what :meth:`submit` or :meth:`Request.result` raises.
        """
        inputs, parameters = program.split(args)
        return program.visible(self.submit(self.instance(program, parameters), inputs, quota).result())

    # Life.

    def configure(self, settings: Settings) -> None:
        """Takes over new settings, from the next bundle and the next compile on."""
        with self._lock:
            self.settings = settings
            for dispatcher in self._dispatchers.values():
                dispatcher.configure(settings)
            self._follow()

    def quiesce(self, timeout: float | None = None, ahead: bool = False) -> bool:
        """Waits until nothing compiles or is captured; False when ``timeout`` seconds passed before.

        Args:
            ahead: waits for kernels of bundle sizes that nobody asked for yet, too.
        """
        return self.compile_thread.quiesce(timeout, Rank.AHEAD if ahead else Rank.SPARE)

    def stats(self) -> StatsSnapshot:
        """What every tenant got so far; on an asynchronous device, of what has ended there."""
        self._catch_up()
        return self._accounting.snapshot()

    def _catch_up(self) -> None:
        for dispatcher in list(self._dispatchers.values()):
            dispatcher.catch_up()

    def plans(self) -> tuple[ProgramReport, ...]:
        """What is known of every program, in the order they were registered."""
        return tuple(report_of(served) for served in list(self._served.values()))

    def mixes(self) -> tuple[MixReport, ...]:
        """The mixes of programs that went out, device by device."""
        return tuple(mix for one in list(self._dispatchers.values()) for mix in one.executor.mixes())

    def health(self) -> EngineHealth:
        """Whether it can serve; see :class:`EngineHealth`."""
        devices = tuple(dispatcher.health() for dispatcher in list(self._dispatchers.values()))
        held = self._accounting.quarantine.tenants(self.clock())
        return EngineHealth.of(self._closed, devices, list(self._served.values()), held)

    def reset(self) -> None:
        """Drains, drops every program, instance and counter, and serves again, also after :meth:`close`."""
        for dispatcher in list(self._dispatchers.values()):
            dispatcher.drain()
        with self._lock:
            remains = self._leave()
            self._start()
            self._closed = False
        remains.stop()

    def close(self) -> None:
        """Drains what can run and refuses everything from now on, until :meth:`reset`."""
        with self._lock:
            self._closed = True
            remains = self._leave()
        remains.stop()

    def _leave(self) -> Remains:
        """Lets go of every program at one moment; the lock is held."""
        dispatchers, programs = list(self._dispatchers.values()), list(self._served.values())
        self._dispatchers, self._served = {}, {}
        self._follow()
        for one in programs:
            for instance in one.instances:
                instance.dropped = True
        return Remains(self.compile_thread, dispatchers, programs, self._forecasts)

    def lower_reserve(self, tenant: str, reserve: float) -> None:
        """A tenant's quota grants it no more than ``reserve`` from now on, whether it asks again or not."""
        self._admission.lower(tenant, reserve)

    def after_fork(self) -> None:
        """In a forked child: threads and pending requests are gone; programs compile again on use."""
        dispatchers = list(self._dispatchers.values())
        for served in self._served.values():
            for instance in served.instances:
                instance.dropped = True
        self._lock = threading.RLock()
        self._start()
        for dispatcher in dispatchers:
            dispatcher.abandon_after_fork()

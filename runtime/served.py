"""What the runtime keeps of one program."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from operator import mul
from typing import TYPE_CHECKING, Any

from torch import Tensor

from torch_mux import compat
from torch_mux.errors import DeviceMismatch, ExecutionFailed, ModelRemoved, MuxError
from torch_mux.lowering.program import Program
from torch_mux.runtime.instance import Instance, InstanceTable
from torch_mux.runtime.memory import MemoryLedger, make_room, out_of_memory
from torch_mux.runtime.queues import ProgramQueue
from torch_mux.runtime.ring import Layouts
from torch_mux.types import FallbackReason

if TYPE_CHECKING:
    from torch_mux.lowering.plan import CompiledPlan
    from torch_mux.lowering.storage import Storage
    from torch_mux.runtime.dispatch import Dispatcher

__all__ = ["ServedProgram", "failure", "outdate"]

_CHANGES = 64
_RUNTIME = __name__.rpartition(".")[0]


class ServedProgram:
    """A program with its plan, instances and queue.

    Attributes:
        key: the program's fingerprint.
        plan: None until it is compiled.
        detour: a per-instance plan for the time in which that one is retired, once it was needed.
        make_detour: has the detour made, off the request path.
        stuck: why it could not be made the last time, or None.
        retired: why the plan is retired now, or None.
        changes: the reason of each retirement, and None of each return.
        error: why it did not compile, or None.
        ready: requests may go out.
        coalesced: one run serves many slots, unless the plan is retired: outputs are made in advance.
        work: floating-point operations of one request, at least 1.
        slots: most slots of one bundle as far as the plan and the tables are concerned.
        ordered: bundles must keep their order, so they stay on the first lane.
        queues: of tenants without and with a reserve; guarded by the dispatcher's mutex.
        sizes: bundles that went out, by number of slots.
        compile_seconds: how long the plan took to make, or to load.
        output_bytes: bytes of one request's outputs.
        layouts: of its bundles' tables on a GPU.
    """

    def __init__(self, program: Program, dispatcher: Dispatcher, memory: MemoryLedger | None = None) -> None:
        self.program = program
        self.key = program.fingerprint
        self.dispatcher = dispatcher
        self._memory = memory
        self.plan: CompiledPlan | None = None
        self.detour: CompiledPlan | None = None
        self.make_detour: Callable[[FallbackReason], object] = lambda reason: None
        self.stuck: FallbackReason | None = None
        self.retired: FallbackReason | None = None
        self.changes: deque[FallbackReason | None] = deque(maxlen=_CHANGES)
        self._most = 1
        self.error: Exception | None = None
        self.ready = False
        self.coalesced = program.fallback is None and not program.mutates
        self.work = 1
        self.slots = 1
        self.ordered = program.mutates
        self.queues = (ProgramQueue(self, False), ProgramQueue(self, True))
        self.instances = InstanceTable()
        self.sizes: Counter[int] = Counter()
        self.compile_seconds = 0.0
        self.output_bytes = sum(spec.nbytes for spec in program.outputs if spec is not None)
        self.layouts = Layouts(program)
        self.devices = tuple(
            (index, spec.device) for index, spec in enumerate(program.inputs) if spec is not None
        )
        self._outputs: tuple[Callable[[int], Sequence[object]], ...] = tuple(
            compat.empties(tuple(spec.shape), tuple(spec.strides), spec.dtype, spec.device)
            if spec is not None
            else partial(mul, [program.literals.get(position)])
            for position, spec in enumerate(program.outputs)
        )

    def finished(self, seconds: float) -> None:
        """Its plan, or its error, is there after ``seconds``: requests can go out, or fail."""
        self.compile_seconds = seconds
        self.memory_changed()
        self.dispatcher.compiled(self)

    def check(self, inputs: Sequence[Any]) -> None:
        """Compares the devices of a request's inputs with the program's.

        Raises:
            DeviceMismatch: the first input that lies elsewhere.
        """
        for index, device in self.devices:
            got = inputs[index].device
            if got != device:
                raise DeviceMismatch(index=index, model=self.program.name, got=str(got), want=str(device))

    def memory_changed(self, instance: Instance | None = None) -> None:
        """What is held for the program, or for one instance, is not what it was. Takes no lock."""
        if self._memory is not None:
            self._memory.changed(instance)

    def empty_outputs(self, calls: Sequence[tuple[Instance, Sequence[object], Any]]) -> list[list[object]]:
        """Uninitialised outputs of these calls, inference tensors in inference mode.

        Each has its own storage, except those that are views of an input, a parameter or another.

        Args:
            calls: an instance and its inputs each, and whatever else.
        """
        columns = [make(len(calls)) for make in self._outputs]
        outputs = list(map(list, zip(*columns, strict=True))) if columns else [[] for _ in calls]
        if self.program.derived:
            for own, (instance, inputs, _) in zip(outputs, calls, strict=True):
                self.program.derive(own, inputs, instance.current())
        return outputs

    def allocate(self, calls: Sequence[tuple[Instance, Sequence[object], Any]]) -> list[list[object]]:
        """:meth:`empty_outputs`, tried again when torch has given back what it kept.

        Raises:
            ExecutionFailed: there is no memory for them.
        """
        try:
            return self.empty_outputs(calls)
        except Exception as error:
            if not out_of_memory(error):
                raise
        make_room(self.program.device)
        try:
            return self.empty_outputs(calls)
        except Exception as error:
            raise failure(self, error) from error

    def take(self, retired: FallbackReason | None) -> None:
        """Goes to the detour for that reason, or back for None; under the dispatcher's role."""
        if retired is not None:
            self._most = self.slots
        self.retired = retired
        self.changes.append(retired)
        self.slots = self._most if retired is None else 1
        self.memory_changed()

    def let_go(self) -> None:
        """It was dropped and serves nothing more: whoever still knows it keeps no tables of it alive."""
        self.plan = self.detour = None
        self.make_detour = lambda reason: None

    @property
    def active(self) -> CompiledPlan:
        """The plan that the next bundle of a program that is ready runs on."""
        return self.detour if self.retired is not None and self.detour is not None else self.compiled

    @property
    def compiled(self) -> CompiledPlan:
        """The plan of a program that is ready."""
        assert self.plan is not None
        return self.plan

    @property
    def storage(self) -> Storage:
        """The tables of a program that is ready."""
        return self.compiled.storage


def unservable(instance: Instance) -> MuxError | None:
    """Why no request of an instance can be served, if so: it was removed, or its plan did not compile."""
    served = instance.served
    if instance.removed:
        return ModelRemoved(model=served.program.name)
    return None if served.error is None else failure(served, served.error)


def failure(served: ServedProgram, cause: BaseException) -> ExecutionFailed:
    """The error for the caller whose run of ``served`` raised ``cause``, which is chained."""
    traceback = cause.__traceback__
    # The runtime's own frames hold whole bundles: without them a kept exception keeps nobody's tensors alive.
    while traceback is not None and traceback.tb_frame.f_globals.get("__name__", "").startswith(_RUNTIME):
        traceback = traceback.tb_next
    cause.__traceback__ = traceback
    error = ExecutionFailed(f"{type(cause).__name__}: {cause}", model=served.program.name)
    error.__cause__ = cause
    return error


def outdate(programs: Iterable[ServedProgram], served: ServedProgram, parameters: Sequence[Tensor]) -> None:
    """Forgets the model as other programs than ``served`` knew it before ``.to()`` changed its weights."""
    for other in programs:
        former = other.instances.find(parameters) if other is not served and parameters else None
        if former is not None and not former.removed and not former.fits:
            other.dispatcher.outdated(former)

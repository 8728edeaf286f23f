"""What the dispatcher asks of a device, and what both executors share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch

from torch_mux.lowering.program import Program
from torch_mux.runtime.bundle import Bundle
from torch_mux.runtime.instance import Instance
from torch_mux.runtime.interrupt import Interrupt
from torch_mux.runtime.memory import make_room, out_of_memory
from torch_mux.runtime.mixes import MixReport
from torch_mux.runtime.request import Request
from torch_mux.runtime.scheduler.base import LaneLoad, QueueName
from torch_mux.runtime.served import ServedProgram, failure
from torch_mux.settings import Settings
from torch_mux.types import TensorSpec

__all__ = [
    "Executor",
    "ExecutorReport",
    "Flight",
    "Stack",
    "bound_rows",
    "plain_context",
    "renewed",
    "run_each_alone",
    "written_rows",
]

#: Makes the uninitialised [slots, *shape] input buffer of a spec.
Stack = Callable[[TensorSpec, int], torch.Tensor]

_NOTHING = contextlib.nullcontext()


@dataclass(frozen=True)
class ExecutorReport:
    """Executables of one program on one device.

    Attributes:
        captured: bundle sizes captured, by lane.
        failures: why captures failed, one text each.
        segments: of the captured graph with the most.
    """

    captured: tuple[tuple[int, ...], ...] = ()
    failures: tuple[str, ...] = ()
    segments: int = 1


@dataclass(eq=False, slots=True)
class Flight:
    """A bundle under way on an asynchronous device.

    Attributes:
        bundle: what it carries.
        launched: seconds on the clock when it was enqueued.
        began: seconds on the clock when the device came to it, once it is first on its lane.
        ended: seconds on the clock when the device finished it, once known.
        seconds: device seconds it took, once known.
        charge: picoseconds of the device's busy time that are its; see :class:`BusyTime`.
        paused: seconds for which others went before it while it was under way.
        error: what the device reported, or None.
        finished: whether the device is known to have finished it.
        way: how it ran, besides program and slots: only bundles that ran in the same way take as long; None:
            in no way that comes again.
        delayed: whether something else may have made it longer: the host, or what compiles and captures.
    """

    bundle: Bundle
    launched: float
    began: float = field(default=0.0)
    ended: float = field(default=0.0)
    seconds: float = field(default=0.0)
    charge: int = field(default=0)
    paused: float = field(default=0.0)
    error: Exception | None = field(default=None)
    finished: bool = field(default=False)
    way: Hashable | None = field(default=())
    delayed: bool = field(default=False)


class Executor(Protocol):
    """One device.

    Only the holder of the dispatcher's role calls launch, reap and at_work; the compile thread calls
    rehearse.

    Attributes:
        fault: what the device reported that only a new process ends, or None.
        together: most programs whose bundles :meth:`launch_together` takes; 1 where it takes none.
        asynchronous: whether a bundle is enqueued, so that the host goes on while the device works.
    """

    device: torch.device
    sms: int
    fault: Exception | None
    together: int
    asynchronous: bool

    def configure(self, settings: Settings) -> None:
        """Takes over new settings before the next bundle."""
        ...

    def slots(self, program: Program) -> int:
        """Most slots of one bundle of ``program`` that the tables have room for."""
        ...

    def rehearse(self, served: ServedProgram) -> None:
        """Runs a new plan once, on the compile thread, so that no request waits for what that compiles."""
        ...

    def loads(self) -> Sequence[LaneLoad]:
        """What every lane carries."""
        ...

    def mark(self) -> object:
        """A point on the caller's current stream that the request's bundle shall wait for."""
        ...

    def launch(self, bundle: Bundle) -> Flight | None:
        """Runs a bundle, or enqueues it and returns its flight. Errors of single requests are set on them."""
        ...

    def packs(self, served: ServedProgram) -> bool:
        """Whether bundles of a program may go out as one with others'."""
        ...

    def launch_together(self, bundles: Sequence[Bundle]) -> Sequence[Flight] | None:
        """Runs bundles of several programs as one.

        Returns:
            Their flights, in order; none where they were run to their end; None where nothing was done,
            because this mix is not built yet, and each is to go out by itself.

        Raises:
            Exception: what went wrong; nothing of it is under way then, and each may go out by itself.
        """
        ...

    def mixes(self) -> Sequence[MixReport]:
        """What is known of the mixes of programs that went out."""
        ...

    def reap(self) -> Sequence[Flight]:
        """The flights that the device has finished since the last call, oldest first of each lane."""
        ...

    def flying(self) -> bool:
        """Whether bundles are under way."""
        ...

    def at_work(self) -> Sequence[Flight]:
        """The flights that the lanes are busy with: the first of each."""
        ...

    def at_it(self, name: QueueName) -> bool:
        """Whether bundles from the queue of that name are under way; for any thread."""
        ...

    def await_end(self, interrupt: Interrupt | None = None) -> None:
        """Blocks the host until a bundle that is under way has ended, or until ``interrupt`` is set.

        Any thread may call it.
        """
        ...

    def join(self, requests: Sequence[Request]) -> None:
        """Makes the caller's current stream wait for these requests, all of which have gone out."""
        ...

    def forget(self, served: ServedProgram) -> None:
        """Drops what is kept for a program of which nothing is under way."""
        ...

    def pool_bytes(self) -> int:
        """Bytes of the buffers that plans run in, which all programs share."""
        ...

    def report(self, served: ServedProgram) -> ExecutorReport:
        """What is built for a program."""
        ...


def plain_context(device_type: str) -> contextlib.AbstractContextManager[object]:
    """A context in which the dispatching caller's autocast does not reach into other people's requests."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return _NOTHING


def bound_rows(bundle: Bundle, verify: bool, before: Callable[[bool], object] | None = None) -> list[int]:
    """The row of each slot, on the current stream: new instances are bound, stale ones refreshed.

    Args:
        verify: compare every instance with what its row holds; otherwise only announced changes count.
        before: called before each write with True for a new row, which may move the tables, and False for an
            old one.
    """
    storage = bundle.served.storage
    rows: list[int] = []
    seen: dict[Instance, int] = {}
    for request in bundle.requests:
        instance = request.instance
        row = seen.get(instance)
        if row is None:
            row = instance.row
            if row is None:
                if before is not None:
                    before(True)
                row = instance.bind()
            elif instance.renew or (verify and storage.stale(row)):
                if before is not None:
                    before(False)
                instance.rewrite(row)
            seen[instance] = row
        rows.append(row)
    return rows


def written_rows(bundle: Bundle) -> list[int] | None:
    """The row of each slot, or None where one of them has to be written first."""
    instances = [request.instance for request in bundle.requests]
    rows = [instance.row for instance in instances]
    if None in rows or [instance for instance in instances if instance.renew]:
        return None
    return cast("list[int]", rows)


def renewed(bundle: Bundle) -> bool:
    """Whether a bundle read rows that no longer hold their weights; they are written again for the next."""
    storage = bundle.served.storage
    found = [
        instance
        for instance in {request.instance for request in bundle.requests}
        if instance.row is not None and storage.stale(instance.row)
    ]
    for instance in found:
        instance.renew = True
    return bool(found)


def run_each_alone(bundle: Bundle) -> None:
    """Runs the slots one by one through the plan's per-instance form, each in its caller's inference mode.

    What one of them raises becomes that request's error. One that finds no memory is tried again when torch
    has given back what it kept, unless it may have written something already.
    """
    for request in bundle.requests:
        error = _run_alone(request)
        if out_of_memory(error) and not bundle.served.program.mutates:
            make_room(bundle.served.program.device)
            error = _run_alone(request)
        if error is not None:
            request.error = failure(bundle.served, error)


def _run_alone(request: Request) -> Exception | None:
    try:
        with torch.inference_mode(request.inference), torch.no_grad():
            plan = request.served.active
            request.alone = True
            request.outputs = plan.run_alone(request.instance.current(), request.inputs)
    except Exception as error:
        return error
    return None

"""From calls to queued requests: admission, memory, outputs, the line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby, zip_longest
from threading import get_ident

import torch

from torch_mux.errors import ClosedError, DeadlineUnattainable, DeviceFailed, Overloaded
from torch_mux.runtime.admission import Admission, Refusals
from torch_mux.runtime.instance import Instance
from torch_mux.runtime.memory import MemoryLedger
from torch_mux.runtime.outlook import Outlook, Prospect
from torch_mux.runtime.request import Request, by_dispatcher
from torch_mux.runtime.scheduler.delays import Delay
from torch_mux.runtime.served import ServedProgram
from torch_mux.types import Quota

__all__ = ["Call", "Submission"]

#: An instance, the program's inputs in order, and the quota.
Call = tuple[Instance, Sequence[object], Quota]
#: Calls, for how many seconds each is held or None, and by index what was foreseen of it.
Admitted = tuple[Sequence[Call], "Sequence[float] | None", dict[int, tuple[Delay, float]]]


def _nobody(index: int, seconds: float) -> None:
    """Nobody is late without a deadline."""


class Submission:
    """Queues requests together, or none of them.

    Args:
        catch_up: counts what the devices have finished.
    """

    def __init__(
        self,
        admission: Admission,
        memory: MemoryLedger,
        clock: Callable[[], float],
        catch_up: Callable[[], object],
    ) -> None:
        self._admission = admission
        self._memory = memory
        self._clock = clock
        self._catch_up = catch_up
        self._quarantine = admission.quarantine

    def queue(
        self, calls: Sequence[Call], kick: bool = False, refused: Refusals | None = None
    ) -> list[Request]:
        """See :meth:`torch_mux.runtime.engine.Engine.submit_all`; the instances are live."""
        arrival = self._clock()
        if self._quarantine.watching:
            for instance, _, quota in calls:
                self._quarantine.check((quota.tenant, instance.served.program.name), arrival)
        asked = calls
        try:
            calls, waits, foreseen = self._admit(calls, arrival, refused)
        except DeadlineUnattainable:
            self._kick(asked, kick, True)
            raise
        try:
            self._memory.reserve(calls)
        except BaseException:
            self._admission.withdraw([quota for _, _, quota in calls])
            raise
        requests: list[Request] = []
        queued: list[Request] = []
        try:
            self._make(calls, waits, arrival, requests)
            for index, known in foreseen.items():
                if waits is None or not waits[index]:
                    requests[index].foreseen = known
            groups = by_dispatcher(requests)
            for dispatcher, own in groups:  # all of them first: a device that fails has no other's queued
                executor = dispatcher.executor
                if dispatcher.closed:
                    raise ClosedError
                if executor.fault is not None:
                    raise DeviceFailed(device=executor.device, fault=executor.fault) from executor.fault
                mark = executor.mark()
                if mark is not None:
                    for request in own:
                        request.mark = mark
            for dispatcher, own in groups:
                dispatcher.enqueue(own)
                queued.extend(own)
        except BaseException:
            # What was queued gives its memory back when it ends.
            gone = set(queued)
            left = [call for call, request in zip_longest(calls, requests) if request not in gone]
            self._memory.cancel([(instance, quota) for instance, _, quota in left])
            self._admission.withdraw([quota for _, _, quota in left])
            raise
        if refused:
            self._admission.refuse([asked[index][2] for index in refused])
        self._kick(asked, kick, bool(refused))  # to be interrupted here must not take back what is queued
        return requests

    def _kick(self, calls: Sequence[Call], kick: bool, refused: bool) -> None:
        """Has them sent out if nobody will wait for them; who was refused leaves the host to who sends."""
        if kick:
            for dispatcher in dict.fromkeys([instance.served.dispatcher for instance, _, _ in calls]):
                dispatcher.kick(roused=True, refused=refused)

    def _admit(self, calls: Sequence[Call], now: float, refused: Refusals | None) -> Admitted:
        """Those that are accepted: all, but for what is noted in ``refused``."""
        if refused:
            refused.clear()  # it is from a try before
        quotas = [quota for _, _, quota in calls]
        try:
            waits, foreseen = self._judge(calls, quotas, now, refused)
        except Overloaded:
            self._catch_up()
            waits, foreseen = self._judge(calls, quotas, now, refused)
        if refused:
            kept = [index for index in range(len(calls)) if index not in refused]
            calls = [calls[index] for index in kept]
            waits = waits and [waits[index] for index in kept]
            foreseen = {place: foreseen[index] for place, index in enumerate(kept) if index in foreseen}
        return calls, waits, foreseen

    def _judge(
        self, calls: Sequence[Call], quotas: Sequence[Quota], now: float, refused: Refusals | None
    ) -> tuple[Sequence[float] | None, dict[int, tuple[Delay, float]]]:
        """For how many seconds each is held, and what is foreseen of those with a deadline."""
        if all(quota.deadline is None for quota in quotas):
            return self._admission.admit(quotas, now, _nobody, refused), {}
        outlook = self._outlook(calls, now)
        return self._admission.admit(quotas, now, outlook.late, refused), outlook.foreseen

    def _outlook(self, calls: Sequence[Call], now: float) -> Outlook:
        """When each of these would end."""
        found: dict[tuple[ServedProgram, bool], Prospect] = {}

        def prospect(index: int) -> Prospect | None:
            instance, _, quota = calls[index]
            served = instance.served
            one = found.get((served, quota.reserve > 0.0))
            if one is None and served.ready:
                one = served.dispatcher.prospect(served, quota)
                found[served, quota.reserve > 0.0] = one
            return one

        return Outlook(prospect, lambda index: calls[index][2], len(calls), now)

    def _make(
        self, calls: Sequence[Call], waits: Sequence[float] | None, arrival: float, requests: list[Request]
    ) -> None:
        inference, client = torch.is_inference_mode_enabled(), get_ident()
        for served, alike in _by_program(calls):
            made = served.allocate(alike) if served.coalesced else [[] for _ in alike]
            dispatcher = served.dispatcher
            requests += [
                Request(dispatcher, instance, inputs, outputs, quota, inference, arrival, client)
                for (instance, inputs, quota), outputs in zip(alike, made, strict=True)
            ]
        if waits is not None:
            for request, wait in zip(requests, waits, strict=True):
                request.eligible = arrival + wait


def _by_program(calls: Sequence[Call]) -> list[tuple[ServedProgram, Sequence[Call]]]:
    """Neighbours of one program together."""
    first = calls[0][0].served if calls else None
    if first is not None and not [call for call in calls if call[0].served is not first]:
        return [(first, calls)]
    return [(served, list(own)) for served, own in groupby(calls, lambda call: call[0].served)]

"""From calls to queued requests: admission, memory, outputs, the line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby, zip_longest
from threading import get_ident

import torch

from torch_mux.errors import ClosedError, DeviceFailed, Overloaded
from torch_mux.runtime.admission import Admission, Refusals
from torch_mux.runtime.instance import Instance
from torch_mux.runtime.memory import MemoryLedger
from torch_mux.runtime.outlook import Outlook, Prospect
from torch_mux.runtime.request import Request, by_dispatcher
from torch_mux.runtime.served import ServedProgram
from torch_mux.types import Quota

__all__ = ["Call", "Submission"]

#: An instance, the program's inputs in order, and the quota.
Call = tuple[Instance, Sequence[object], Quota]


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
        quotas = [quota for _, _, quota in calls]
        arrival = self._clock()
        if self._quarantine.watching:
            for instance, _, quota in calls:
                self._quarantine.check((quota.tenant, instance.served.program.name), arrival)

        outlook = self._outlook(calls, arrival)
        try:
            waits = self._admission.admit(quotas, arrival, outlook.late, refused)
        except Overloaded:
            self._catch_up()
            outlook = self._outlook(calls, arrival)
            waits = self._admission.admit(quotas, arrival, outlook.late, refused)
        foreseen = outlook.foreseen
        if refused:
            self._admission.refuse([quotas[index] for index in refused])
            kept = [index for index in range(len(calls)) if index not in refused]
            calls, quotas = [calls[index] for index in kept], [quotas[index] for index in kept]
            waits = waits and [waits[index] for index in kept]
            foreseen = {place: foreseen[index] for place, index in enumerate(kept) if index in foreseen}
        try:
            self._memory.reserve(calls)
        except BaseException:
            self._admission.withdraw(quotas)
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
        if kick:  # of what is queued by now: to be interrupted here must not take it back
            for dispatcher, _ in groups:
                dispatcher.kick(roused=True)
        return requests

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

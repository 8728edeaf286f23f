"""From calls to queued requests: admission, memory, outputs, the line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby, zip_longest
from threading import get_ident

import torch

from torch_mux.errors import ClosedError, DeviceFailed, Overloaded
from torch_mux.runtime.admission import Admission
from torch_mux.runtime.instance import Instance
from torch_mux.runtime.memory import MemoryLedger
from torch_mux.runtime.request import Request, by_dispatcher
from torch_mux.runtime.served import ServedProgram
from torch_mux.settings import Settings
from torch_mux.types import Quota

__all__ = ["Call", "Submission"]

#: An instance, the program's inputs in order, and the quota.
Call = tuple[Instance, Sequence[object], Quota]
_Place = tuple[ServedProgram, int, bool]


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
        settings: Callable[[], Settings],
        catch_up: Callable[[], object],
    ) -> None:
        self._admission = admission
        self._memory = memory
        self._clock = clock
        self._settings = settings
        self._catch_up = catch_up
        self._quarantine = admission.quarantine

    def queue(self, calls: Sequence[Call], kick: bool = False) -> list[Request]:
        """See :meth:`torch_mux.runtime.engine.Engine.submit_all`; the instances are live."""
        quotas = [quota for _, _, quota in calls]
        arrival = self._clock()
        if self._quarantine.watching:
            for instance, _, quota in calls:
                self._quarantine.check((quota.tenant, instance.served.program.name), arrival)

        known: dict[_Place, float | None] = {}

        def outlook(index: int, before: int) -> float | None:
            instance, _, quota = calls[index]
            return self._outlook(instance.served, quota, before, arrival, known)

        try:
            waits = self._admission.admit(quotas, arrival, outlook)
        except Overloaded:
            self._catch_up()
            known.clear()
            waits = self._admission.admit(quotas, arrival, outlook)
        try:
            self._memory.reserve(calls)
        except BaseException:
            self._admission.withdraw(quotas)
            raise
        requests: list[Request] = []
        queued: list[Request] = []
        try:
            self._make(calls, waits, arrival, requests)
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
            kept = set(queued)
            left = [call for call, request in zip_longest(calls, requests) if request not in kept]
            self._memory.cancel([(instance, quota) for instance, _, quota in left])
            self._admission.withdraw([quota for _, _, quota in left])
            raise
        if kick:  # of what is queued by now: to be interrupted here must not take it back
            for dispatcher, _ in groups:
                dispatcher.kick(roused=True)
        return requests

    def _outlook(
        self, served: ServedProgram, quota: Quota, before: int, now: float, known: dict[_Place, float | None]
    ) -> float | None:
        """When a request would have ended: behind what is under way and what is queued of its tenant.

        Args:
            known: what was asked in the same call already.
        """
        if not served.ready:
            return None
        ahead, reserved = served.dispatcher.ahead(served, quota)
        place = served, ahead + before, reserved
        if place not in known:
            most = max(1, min(self._settings().max_bundle, served.slots))
            slots, bundles = min(most, place[1] + 1), place[1] // most + 1
            known[place] = served.dispatcher.policy.outlook(served.key, slots, bundles, now, reserved)
        return known[place]

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

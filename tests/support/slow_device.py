"""A device that goes on after the host has its answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from clocks import Told

from torch_mux.runtime.bundle import Bundle
from torch_mux.runtime.executors.base import Flight
from torch_mux.runtime.executors.cpu import CpuExecutor
from torch_mux.runtime.interrupt import Interrupt
from torch_mux.runtime.scheduler.base import LaneLoad, QueueName, idle_lanes
from torch_mux.runtime.served import failure
from torch_mux.settings import Settings

__all__ = ["SlowDevice", "slow"]

_LOOK = 0.25e-3


@dataclass(eq=False)
class SlowFlight(Flight):
    """Ends at a time of its own."""

    until: float = 0.0


class SlowDevice(CpuExecutor):
    """Answers at once and is busy afterwards, for ``seconds`` a bundle on each lane."""

    seconds = 0.02

    def __init__(self, device: torch.device, stack: Any, clock: Callable[[], float]) -> None:
        super().__init__(device, stack)
        self.asynchronous = True
        self.clock = clock
        self.lanes: list[list[SlowFlight]] = [[]]
        self.highest = 0
        self.faults: list[Exception] = []
        self.on_end: Callable[[SlowFlight], object] = lambda flight: None
        self.seconds_of: Callable[[Bundle], float] = lambda bundle: self.seconds

    def configure(self, settings: Settings) -> None:
        self.idle = idle_lanes(settings, settings.branches or 1)
        while len(self.lanes) < len(self.idle):
            self.lanes.append([])

    def loads(self) -> Sequence[LaneLoad]:
        return [replace(idle, bundles=len(lane)) for lane, idle in zip(self.lanes, self.idle, strict=False)]

    def launch(self, bundle: Bundle) -> Flight | None:
        super().launch(bundle)
        lane = self.lanes[bundle.lane]
        now = self.clock()
        begin = max([now, *(flight.until for flight in lane)])
        seconds = self.seconds_of(bundle)
        if bundle.issue.passes:
            self._stop_others(lane, begin + seconds - now)
        flight = SlowFlight(bundle, now, began=begin, seconds=seconds, until=begin + seconds)
        for request in bundle.requests:
            request.flight = flight
        lane.append(flight)
        self.highest = max(self.highest, len(lane))
        return flight

    def _stop_others(self, own: list[SlowFlight], seconds: float) -> None:
        for lane in self.lanes:
            if lane is not own and lane:
                lane[0].seconds += seconds
                for flight in lane:
                    flight.until += seconds

    def reap(self) -> Sequence[Flight]:
        landed: list[Flight] = []
        for lane in self.lanes:
            while lane and lane[0].until <= self.clock():
                flight = lane.pop(0)
                flight.ended, flight.finished = flight.until, True
                if self.faults:
                    flight.error = failure(flight.bundle.served, self.faults.pop())
                landed.append(flight)
                self.on_end(flight)
        return landed

    def flying(self) -> bool:
        return any(self.lanes)

    def at_work(self) -> Sequence[Flight]:
        return [lane[0] for lane in self.lanes if lane]

    def at_it(self, name: QueueName) -> bool:
        return any(flight.bundle.issue.queue == name for lane in self.lanes for flight in list(lane))

    def await_end(self, interrupt: Interrupt | None = None) -> None:
        end = min([lane[0].until for lane in self.lanes if lane], default=0.0)
        while (left := end - self.clock()) > 0.0 and not interrupt:
            time.sleep(min(left, _LOOK) if self.clock is time.perf_counter else _LOOK)


def slow(lab: Any, own: Callable[[], float] = time.perf_counter, **settings: Any) -> tuple[Any, SlowDevice]:
    """An engine, and its device.

    Args:
        own: the device's clock; the engine's too unless that has one of its own.
    """
    made: list[SlowDevice] = []
    settings.setdefault("clock", own)

    def make(engine: Any, device: torch.device) -> SlowDevice:
        executor = SlowDevice(device, lab.stack, own)
        made.append(executor)
        return executor

    engine = lab.engine(executor=make, **settings)
    if isinstance(own, Told):
        lab.at_last.append(lambda: setattr(own, "now", float("inf")))
    engine.register(lab.program())
    assert engine.quiesce(10)
    return engine, made[0]

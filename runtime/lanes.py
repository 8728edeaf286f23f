"""A lane: a CUDA stream with its priority, its tables, its executables and what is under way on it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from torch_mux.runtime.executors.base import Flight
from torch_mux.runtime.ring import TableRing

__all__ = ["CudaFlight", "Executable", "Lane", "new_event", "new_stream", "passed"]

_WORDS = 1 << 15
# More than are enqueued at once, so that a bundle that is enqueued again never meets its own entry.
_ENTRIES = 8


# torch ships no types for these.
_cuda: Any = torch.cuda


def new_event(timing: bool = False) -> torch.cuda.Event:
    """An event that is not recorded yet."""
    return cast(torch.cuda.Event, _cuda.Event(enable_timing=timing))


def new_stream(device: torch.device, priority: int = 0) -> torch.cuda.Stream:
    """A stream of its own; a lower ``priority`` number goes first."""
    return cast(torch.cuda.Stream, _cuda.Stream(device, priority=priority))


def passed(event: torch.cuda.Event) -> bool:
    """Whether the device has reached the event."""
    return bool(cast(Any, event).query())


def _timed() -> torch.cuda.Event:
    return new_event(timing=True)


@dataclass(eq=False)
class CudaFlight(Flight):
    """A bundle enqueued on a lane.

    Attributes:
        start, end: timing events around its work on the lane's stream.
        kept: what the device still reads or writes.
    """

    start: torch.cuda.Event = field(default_factory=_timed)
    end: torch.cuda.Event = field(default_factory=_timed)
    kept: tuple[object, ...] = field(default=())

    def wait(self) -> None:
        """Blocks the host, without the GIL, until the device finished it."""
        self.end.synchronize()


@dataclass(frozen=True, eq=False)
class Executable:
    """A captured CUDA graph that reads nothing but the lane's table and the program's storage.

    Attributes:
        graph: the captured graph.
        slots: the bundle size it was captured for.
        generation: the storage's generation then; tables that moved since make it invalid.
    """

    graph: torch.cuda.CUDAGraph
    slots: int
    generation: int


class Lane:
    """One stream of one device with everything that belongs to it.

    Attributes:
        stream: where its bundles run.
        ring: its tables.
        flights: bundles under way, oldest first.
        executables: captured graphs by program key and number of slots.
        pool_bytes: what the pool takes of the device, measured after the last capture.
        pool: the memory pool that all of its graphs share, which they may since they run one after another.
    """

    def __init__(self, index: int, device: torch.device, priority: int = 0) -> None:
        self.index = index
        self.stream = new_stream(device, priority)
        self.ring = TableRing(_ENTRIES, _WORDS, device)
        self.flights: deque[CudaFlight] = deque()
        self.executables: dict[str, dict[int, Executable]] = {}
        self.pool: Any = None
        self.pool_bytes = 0
        self.free_at = 0.0
        # The table was zeroed on the creating thread's stream.
        torch.cuda.current_stream(device).synchronize()

    @staticmethod
    def words() -> int:
        """Words in a table of any lane."""
        return _WORDS

    def executable(self, key: str, slots: int, generation: int) -> Executable | None:
        """The best captured graph: of that size, or the smallest that is at most twice as large."""
        sizes = self.executables.get(key)
        if not sizes:
            return None
        exact = sizes.get(slots)
        if exact is not None and exact.generation == generation:
            return exact
        fitting = [
            found
            for size, found in list(sizes.items())
            if slots < size <= 2 * slots and found.generation == generation
        ]
        return min(fitting, key=lambda found: found.slots, default=None)

    def add(self, key: str, executable: Executable) -> None:
        """Takes a captured graph, and drops those of older tables; called by the compile thread."""
        kept = {
            slots: other
            for slots, other in self.executables.get(key, {}).items()
            if other.generation == executable.generation
        }
        self.executables[key] = {**kept, executable.slots: executable}

    def measure_pool(self) -> None:
        """Notes what the graphs' pool takes of the device; takes milliseconds."""
        snapshot: list[dict[str, Any]] = _cuda.memory_snapshot()
        self.pool_bytes = sum(part["total_size"] for part in snapshot if part["segment_pool_id"] == self.pool)

    def forget(self, key: str) -> None:
        """Drops a program's graphs."""
        self.executables.pop(key, None)

"""A lane: a CUDA stream with its priority, its tables, its executables and what is under way on it."""

from __future__ import annotations

import itertools
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from operator import attrgetter
from typing import Any, cast

import torch

from torch_mux import compat
from torch_mux.runtime.bundle import Bundle
from torch_mux.runtime.executors.base import Flight
from torch_mux.runtime.executors.cover import cover
from torch_mux.runtime.request import Request
from torch_mux.runtime.ring import TableRing
from torch_mux.runtime.scheduler.base import LaneKind

__all__ = ["CudaFlight", "Executable", "Lane", "Mark", "Marks", "Side", "marks_of", "new_event", "passed"]

_WORDS = 1 << 15
# More than are enqueued at once, so that a bundle that is enqueued again never meets its own entry.
_ENTRIES = 8
_numbers = itertools.count()


# torch ships no types for these.
_cuda: Any = torch.cuda


def new_event(timing: bool = False) -> torch.cuda.Event:
    """An event that is not recorded yet; who waits for it sleeps, since to spin takes a core."""
    return cast(torch.cuda.Event, _cuda.Event(enable_timing=timing, blocking=True))


def highest_priority() -> int:
    """The number of the priority whose work goes first."""
    return int(_cuda.Stream.priority_range()[1])


class Side:
    """A stream that nobody else of this process has meanwhile, as a lane's is.

    Capturing on a stream on which somebody dispatches would fail both.

    Args:
        priority: a lower number goes first.
        context: the part of the device that it runs on, if not the whole.

    Attributes:
        stream: not of torch's pool, which hands the same ones out again and again.
        address: its ``cudaStream_t``.
    """

    def __init__(
        self, device: torch.device, priority: int = 0, context: compat.green.GreenContext | None = None
    ) -> None:
        draw = partial(compat.own_stream, device) if context is None else context.stream
        self.stream = _lent(self, _returned[device, priority, context], lambda: draw(priority))
        self.address: int = self.stream.cuda_stream


#: Streams whose holders are gone, by where and how urgently they run; they are lent again.
_returned: defaultdict[Hashable, deque[torch.cuda.Stream]] = defaultdict(deque)


def _lent(
    holder: object, returned: deque[torch.cuda.Stream], draw: Callable[[], torch.cuda.Stream]
) -> torch.cuda.Stream:
    """A stream for as long as the holder lives: one that came back, or a new one."""
    try:
        stream = returned.pop()
    except IndexError:
        stream = draw()
    weakref.finalize(holder, returned.append, stream).atexit = False
    return stream


def passed(event: torch.cuda.Event) -> bool:
    """Whether the device has reached the event."""
    return bool(cast(Any, event).query())


class Marks:
    """Events that are recorded again and again: making one costs as much as recording it.

    An event is lent as long as somebody holds its :class:`Mark`.
    """

    def __init__(self, timing: bool = False) -> None:
        self._timing = timing
        self._free: deque[tuple[torch.cuda.Event, int]] = deque()

    def take(self, stream: torch.cuda.Stream) -> Mark:
        """An event that is recorded somewhere already; a new one is recorded on ``stream``."""
        try:
            event, address = self._free.pop()
        except IndexError:
            event = new_event(self._timing)
            event.record(stream)
            address = event.cuda_event
        return Mark(event, address, self._free)


def marks_of(requests: Iterable[Request]) -> list[Mark]:
    """What these were submitted behind, each once."""
    marks = {id(one.mark): one.mark for one in requests}
    return [cast(Mark, mark) for mark in marks.values() if mark is not None]


class Mark:
    """A lent event.

    Attributes:
        event: of torch.
        address: its ``cudaEvent_t``.
    """

    __slots__ = ("_home", "address", "event")

    def __init__(
        self, event: torch.cuda.Event, address: int, home: deque[tuple[torch.cuda.Event, int]]
    ) -> None:
        self.event = event
        self.address = address
        self._home = home

    def record(self, stream: torch.cuda.Stream) -> None:
        """Records it on ``stream``."""
        native = compat.native.enqueue()
        if native is None or not compat.is_current(stream.device):
            self.event.record(stream)
        else:
            native.record(self.address, stream.cuda_stream)

    def wait(self) -> None:
        """Blocks the host, without the GIL, until the device has reached it."""
        self.event.synchronize()

    def __del__(self) -> None:
        self._home.append((self.event, self.address))


@dataclass(eq=False, slots=True)
class CudaFlight(Flight):
    """A bundle enqueued on a lane.

    Attributes:
        start, end: timing events around its work on the lane's stream.
        kept: what the device still reads or writes.
        follows: it is one with the flight before it on its lane, bundles of several programs.
        after: flights of other lanes that it waits for, on the device.
        jobs: of the compile thread that began or ended before it was enqueued.
        host: seconds that the host took to enqueue it from its start to its end, where that may count.
    """

    start: Mark = field(kw_only=True)
    end: Mark = field(kw_only=True)
    kept: tuple[object, ...] = field(default=())
    follows: bool = field(default=False, kw_only=True)
    after: tuple[CudaFlight, ...] = field(default=(), kw_only=True)
    jobs: int = field(default=0, kw_only=True)
    host: float = field(default=0.0, kw_only=True)


@dataclass(frozen=True, eq=False)
class Executable:
    """A captured CUDA graph that reads nothing but the lane's table and the program's storage.

    Attributes:
        graph: the captured graph.
        slots: the bundle size it was captured for.
        generation: of the storage and the settings then; tables that moved since make it invalid.
        segments: between which a more urgent bundle may go first.
    """

    graph: compat.Graph
    slots: int
    generation: Hashable
    segments: int = 1


class Lane:
    """One stream of one device with everything that belongs to it.

    Args:
        context: the part of the device that it runs on, if not the whole.
        kind: who it is for.

    Attributes:
        number: no other lane of the process has it.
        context: see above.
        stream: where its bundles run.
        address: its ``cudaStream_t``.
        ring: its tables.
        marks: timing events for its flights.
        flights: bundles under way, oldest first.
        guests: bundles under way on another lane, with others as one, whose programs are at home here.
        executables: captured graphs by program key and number of slots.
        pool_bytes: what the pool takes of the device, measured after the last capture.
        pool: the memory pool that all of its graphs share, which they may since they run one after another.
    """

    def __init__(
        self,
        index: int,
        device: torch.device,
        priority: int = 0,
        context: compat.green.GreenContext | None = None,
        kind: LaneKind = LaneKind.COMMON,
    ) -> None:
        self.index = index
        self.kind = kind
        self.number = next(_numbers)
        self.context = context
        self._side = Side(device, priority, context)
        self.stream, self.address = self._side.stream, self._side.address
        self.marks = Marks(timing=True)
        with compat.on_stream(self.stream), torch.inference_mode(False):
            self.ring = TableRing(_ENTRIES, _WORDS, device)
        self.flights: deque[CudaFlight] = deque()
        self.guests: list[CudaFlight] = []
        self.executables: dict[str, dict[int, Executable]] = {}
        self.pool: compat.Pool | None = None
        self.pool_bytes = 0
        self._recorder: Side | None = None

    @property
    def recorder(self) -> torch.cuda.Stream:
        """Where graphs of this lane are captured, and nothing ever runs.

        A kernel of a graph runs on that part of the device on whose stream it was captured.
        Vendor libraries keep a workspace a stream, which a graph goes on using. With one for all lanes,
        or for runs as well, they would write into each other's.
        """
        if self._recorder is None:
            self._recorder = Side(self.stream.device, context=self.context)
        return self._recorder.stream

    @property
    def head(self) -> CudaFlight | None:
        """The flight that the device is at, if any; any thread may ask."""
        try:
            return self.flights[0]
        except IndexError:
            return None

    def load(self) -> int:
        """Bundles under way that the lane has room for; those that are one count once."""
        own = sum([not flight.follows for flight in self.flights])
        return own + len(self.visitors()) if self.guests else own

    def visitors(self) -> list[CudaFlight]:
        """The guests that are still under way, one of those that are one."""
        self.guests = [flight for flight in self.guests if not flight.finished]
        return list({id(flight.end): flight for flight in self.guests}.values())

    @property
    def last(self) -> list[CudaFlight]:
        """The flights after whose ends nothing of the lane's programs is under way."""
        return [*list(self.flights)[-1:], *self.visitors()]

    @property
    def heads(self) -> list[CudaFlight]:
        """:attr:`head` and the flights that are one with it."""
        flights = list(self.flights)
        return flights[:1] + list(takewhile(attrgetter("follows"), flights[1:]))

    def flight(self, bundle: Bundle, now: float, after: Sequence[CudaFlight] = ()) -> CudaFlight:
        """A flight for ``bundle`` that is about to be enqueued at ``now``."""
        start, end = self.marks.take(self.stream), self.marks.take(self.stream)
        return CudaFlight(bundle, now, start=start, end=end, after=tuple(after))

    @staticmethod
    def words() -> int:
        """Words in a table of any lane."""
        return _WORDS

    def executable(self, key: str, slots: int, generation: Hashable) -> Executable | None:
        """The captured graph of just that size."""
        found = self.executables.get(key, {}).get(slots)
        return found if found is not None and found.generation == generation else None

    def executables_for(self, key: str, slots: int, generation: Hashable) -> tuple[Executable, ...]:
        """The captured graphs that serve so many slots one after another; none where launches have to."""
        exact = self.executable(key, slots, generation)
        if exact is not None:
            return (exact,)
        known = dict(self.executables.get(key, {}))
        valid = frozenset(size for size, one in known.items() if one.generation == generation)
        return tuple(known[size] for size in cover(slots, valid)) if valid else ()

    def add(self, key: str, executable: Executable) -> None:
        """Takes a captured graph, and drops those of older tables; called by the compile thread."""
        kept = {
            slots: other
            for slots, other in self.executables.get(key, {}).items()
            if other.generation == executable.generation
        }
        self.executables[key] = {**kept, executable.slots: executable}

    def measure_pool(self) -> None:
        """Notes what the graphs' pool takes of the device."""
        self.pool_bytes = 0 if self.pool is None else self.pool.nbytes()

    def forget(self, key: str) -> None:
        """Drops a program's graphs."""
        self.executables.pop(key, None)

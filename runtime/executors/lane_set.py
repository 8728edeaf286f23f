"""The lanes of one GPU, made when the first bundle goes on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch

from torch_mux import compat
from torch_mux.errors import IsolationUnavailable
from torch_mux.runtime.beside import apart, limited
from torch_mux.runtime.lanes import CudaFlight, Lane, highest_priority
from torch_mux.runtime.scheduler.base import Issue, LaneKind, LaneLoad, idle_lanes
from torch_mux.settings import Settings

__all__ = ["LaneSet"]

_Place = tuple[LaneKind, int]


class LaneSet:
    """Lanes by kind and number; those that settings no longer name drain and stay unused."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._green = False
        self._idle: tuple[LaneLoad, ...] = ()
        self._places: tuple[_Place, ...] = ()
        self._shown: tuple[_Place, ...] = ()
        self._numbers: dict[_Place, int] = {}
        self._made: dict[_Place, Lane] = {}

    def __iter__(self) -> Iterator[Lane]:
        return iter(list(self._made.values()))

    def __len__(self) -> int:
        return len(self._made)

    def configure(self, settings: Settings, branches: int) -> None:
        """From now on the indices of lanes mean those of ``settings``.

        Args:
            branches: of each common lane.

        Raises:
            IsolationUnavailable: the device cannot be cut into parts.
        """
        if settings.isolation == "green":
            try:
                compat.green.check(self._device)
            except compat.green.Unavailable as error:
                raise IsolationUnavailable(str(error)) from error
        self._green = settings.isolation == "green"
        seen: Counter[LaneKind] = Counter()
        places: list[_Place] = []
        self._idle = idle_lanes(settings, branches)
        for lane in self._idle:
            places.append((lane.kind, seen[lane.kind]))
            seen[lane.kind] += 1
        self._places = tuple(places)
        self._numbers = {place: number for number, place in enumerate(places)}

    def loads(self) -> Sequence[LaneLoad]:
        """Bundles under way on each lane; :meth:`take` goes by the indices that this showed last."""
        self._shown = self._places
        found = list(self._idle)
        for place, lane in self._made.items():
            if (lane.flights or lane.guests) and (number := self._numbers.get(place)) is not None:
                found[number] = LaneLoad(lane.load(), found[number].kind, found[number].branch)
        return found

    def predecessors(self, lane: Lane, home: Lane, issue: Issue) -> list[CudaFlight]:
        """What a bundle waits for on the device: its program's elsewhere, and what it may not run beside.

        Args:
            lane: where it goes.
            home: where it was sent.
        """
        after = lane.visitors() if lane.guests else []
        if lane is not home:
            after += [flight for flight in home.last if flight not in lane.flights]
        if len(self._made) > 1 and limited(issue):
            common = [other for place, other in self._made.items() if place[0] is LaneKind.COMMON]
            flights = [flight for other in common if other is not lane for flight in other.flights]
            after += [flight for flight in flights if lane in common and apart(issue, flight.bundle.issue)]
        return after

    def take(self, issue: Issue) -> Lane:
        """The lane that an issue names.

        Raises:
            IsolationUnavailable: the device cannot be cut as the reserves ask.
        """
        place = self._shown[issue.lane]
        context = self._context(place[0], issue.reserve)
        lane = self._made.get(place)
        if lane is None or lane.context != context:
            lane = self._made[place] = self._make(issue.lane, place[0], context, lane)
        return lane

    def instead(self, home: Lane, serves: Callable[[Lane], object]) -> Lane:
        """A common lane of the same part of the device that ``serves``, or ``home`` if there is none."""
        if home.kind is LaneKind.PASSING:
            return home
        common = [lane for lane in self.named() if lane.kind is LaneKind.COMMON and lane is not home]
        found = [lane for lane in common if lane.context == home.context and serves(lane)]
        return min(found, key=Lane.load, default=home)

    def first(self) -> Lane:
        """The first common lane, on which mixes go: each lane that has some keeps a stream a member."""
        place = (LaneKind.COMMON, 0)
        if place not in self._made:
            self._made[place] = self._make(0, LaneKind.COMMON, None, None)
        return self._made[place]

    def _context(self, kind: LaneKind, reserve: float) -> compat.green.GreenContext | None:
        """The part of the device that such a lane runs on; None: the whole."""
        if not self._green or kind is LaneKind.COMMON:
            return None
        try:
            halves = compat.green.split(self._device, compat.green.fitting(self._device, reserve))
        except compat.green.Unavailable as error:
            raise IsolationUnavailable(str(error)) from error
        return halves.own if kind is LaneKind.RESERVED else halves.rest

    def _make(
        self, index: int, kind: LaneKind, context: compat.green.GreenContext | None, former: Lane | None
    ) -> Lane:
        """A lane in place of a former one, whose part of the device was another, when that is empty."""
        priority = highest_priority() if kind in (LaneKind.RESERVED, LaneKind.PASSING) else 0
        lane = Lane(index, self._device, priority, context, kind)
        if former is not None:
            for flight in former.flights:
                flight.end.wait()
            lane.flights = former.flights
        return lane

    def named(self) -> list[Lane]:
        """The lanes in use that are made, by index."""
        return [self._made[place] for place in self._places if place in self._made]

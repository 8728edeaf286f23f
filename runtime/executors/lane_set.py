"""The lanes of one GPU, made when the first bundle goes on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from torch_mux.runtime.lanes import Lane, highest_priority
from torch_mux.runtime.scheduler.base import Issue, LaneKind, LaneLoad, lane_kinds
from torch_mux.settings import Settings

__all__ = ["LaneSet"]

_Place = tuple[LaneKind, int]


class LaneSet:
    """Lanes by kind and number; those that settings no longer name drain and stay unused.

    Args:
        device: the GPU.
        sms: its multiprocessors.
    """

    def __init__(self, device: torch.device, sms: int) -> None:
        self._device = device
        self._sms = sms
        self._places: tuple[_Place, ...] = ()
        self._made: dict[_Place, Lane] = {}

    def __iter__(self) -> Iterator[Lane]:
        return iter(list(self._made.values()))

    def __len__(self) -> int:
        return len(self._made)

    def configure(self, settings: Settings) -> None:
        """From now on the indices of lanes mean those of ``settings``."""
        seen: Counter[LaneKind] = Counter()
        places: list[_Place] = []
        for kind in lane_kinds(settings):
            places.append((kind, seen[kind]))
            seen[kind] += 1
        self._places = tuple(places)

    def loads(self) -> Sequence[LaneLoad]:
        """Bundles under way on each lane, by index."""
        made = self._made
        return [
            LaneLoad(len(made[place].flights) if place in made else 0, place[0]) for place in self._places
        ]

    def take(self, issue: Issue) -> Lane:
        """The lane that an issue names."""
        place = self._places[issue.lane]
        lane = self._made.get(place)
        if lane is None:
            lane = self._made[place] = self._make(issue.lane, place[0])
        return lane

    def _make(self, index: int, kind: LaneKind) -> Lane:
        priority = highest_priority() if kind is LaneKind.RESERVED else 0
        return Lane(index, self._device, priority)

    def named(self) -> list[Lane]:
        """The lanes in use that are made, by index."""
        return [self._made[place] for place in self._places if place in self._made]

"""Captured plans in segments of bounded length, between which a more urgent bundle goes first."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from torch_mux.lowering.kernels.interception import Turn, Work, noticed
from torch_mux.lowering.pack.costs import KernelCosts
from torch_mux.runtime.ring import TableLayout
from torch_mux.runtime.scheduler.base import LaneKind
from torch_mux.runtime.weave import Issuer
from torch_mux.settings import Settings

if TYPE_CHECKING:
    from torch_mux.lowering.kernels.common import Launch
    from torch_mux.lowering.kernels.gates import Gate

__all__ = ["Cuts", "Segmenter", "cut", "cut_members"]

#: Part of a segment that super-kernels may fill by estimate: what Inductor made beside them is not estimated.
_FILLED: Final = 0.5


class Cuts:
    """Where launches that follow each other are cut: before the first, and where a segment would be too long.

    Args:
        bound: seconds of a segment.
        seconds: what a launch takes, by estimate.
        stop: makes the launch that a segment begins with.

    Attributes:
        count: segments so far.
    """

    def __init__(self, bound: float, seconds: Callable[[Work], float], stop: Callable[[], Launch]) -> None:
        self.count = 0
        self._room = bound * _FILLED
        self._seconds = seconds
        self._stop = stop
        self._spent = float("inf")

    def before(self, work: Work) -> None:
        """Begins a segment with a launch that would make the last one too long; no launch is cut itself."""
        seconds = self._seconds(work)
        if self._spent > 0.0 and self._spent + seconds > self._room:
            self._stop().start()
            self.count += 1
            self._spent = 0.0
        self._spent += seconds


class Segmenter:
    """What the graphs of each kind of lane have besides their plan, as settings say.

    On lanes that may be overtaken a graph is cut at launches between which more than the bound would pass by
    estimate: a stop there lets who overtakes go first, and reads how many multiprocessors are left. On the
    lane that overtakes, a graph begins and ends with a launch that stops the others meanwhile. On the lane of
    tenants with a reserve, where caps keep it free, it begins and ends with one that takes the
    multiprocessors of its cap from the segments behind. See ``torch_mux.lowering.kernels.gates``.

    Attributes:
        stamp: equal for settings under which graphs are the same.
    """

    def __init__(self, device: torch.device, sms: int) -> None:
        self._device = device
        self._costs = KernelCosts(sms)
        self._sms = sms
        self._gate: Gate | None = None
        self._bound: float | None = None
        self._claims = False
        self.stamp: Hashable = None

    def configure(self, settings: Settings) -> None:
        """Takes over new settings; graphs that were captured under others are not used any more."""
        self._bound = None if settings.isolation == "green" else settings.segment
        self._claims = settings.isolation == "caps"
        self.stamp = None if self._bound is None else (self._bound, self._claims)

    def prepare(self) -> None:
        """Makes what capturing may not, on the current stream and device, and waits for it."""
        if self._bound is None or self._gate is not None:
            return
        from torch_mux.lowering.kernels.gates import Gate

        gate = Gate(self._device)
        control = torch.zeros(2, dtype=torch.int32, device=self._device)
        gate.stop(control, control).build()
        for ends in (False, True):
            gate.overtake(ends).build()
            gate.claim(control, ends).build()
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        self._gate = gate

    @contextlib.contextmanager
    def around(self, kind: LaneKind, layout: TableLayout, table: Tensor) -> Iterator[Cuts | None]:
        """What is launched inside becomes a graph of a lane of that kind, over that table."""
        gate, bound, control = self._gate, self._bound, layout.control(table)
        if bound is None or gate is None:
            yield None
        elif kind is LaneKind.PASSING:
            gate.overtake(ends=False).start()
            yield None
            gate.overtake(ends=True).start()
        elif kind is LaneKind.RESERVED:
            if self._claims:
                gate.claim(control, ends=False).start()
            yield None
            if self._claims:
                gate.claim(control, ends=True).start()
        else:
            cuts = self._cuts(bound, gate, layout, table)
            with noticed(cuts.before):
                yield cuts

    def members(
        self, layouts: Sequence[TableLayout], tables: Sequence[Tensor]
    ) -> Sequence[Callable[[Work], object]]:
        """For each member of a graph of several, what is called before a launch of his, on his stream."""
        gate, bound = self._gate, self._bound
        if bound is None or gate is None:
            return [lambda work: None for _ in layouts]
        places = zip(layouts, tables, strict=True)
        return [self._cuts(bound, gate, layout, table).before for layout, table in places]

    def _cuts(self, bound: float, gate: Gate, layout: TableLayout, table: Tensor) -> Cuts:
        control, own = layout.control(table), layout.control_of_all(table)
        return Cuts(bound, self._seconds, lambda: gate.stop(control, own))

    def _seconds(self, work: Work) -> float:
        """What a launch takes on the whole device, by the estimates that tiles are chosen by."""
        return 0.0 if isinstance(work, Turn) else self._costs.seconds([work.operation], self._sms)


@contextlib.contextmanager
def cut(
    segmenter: Segmenter | None, kind: LaneKind, layout: TableLayout, table: Tensor
) -> Iterator[Cuts | None]:
    """:meth:`Segmenter.around` where there is one."""
    if segmenter is None:
        yield None
    else:
        with segmenter.around(kind, layout, table) as cuts:
            yield cuts


def cut_members(
    segmenter: Segmenter | None,
    issuer: Issuer,
    layouts: Sequence[TableLayout],
    tables: Sequence[Tensor],
    streams: Sequence[torch.cuda.Stream],
) -> Issuer:
    """``issuer``, and before it what cuts each member of a graph of several, each by himself."""
    if segmenter is None:
        return issuer
    before = segmenter.members(layouts, tables)

    def issue(members: Sequence[int], works: Sequence[Work], sms: int, beside: bool) -> Sequence[Work | None]:
        for member, work in zip(members, works, strict=True):
            with torch.cuda.stream(streams[member]):
                before[member](work)
        return issuer(members, works, sms, beside)

    return issue

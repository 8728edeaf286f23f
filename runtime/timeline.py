"""What ran when: bundles and the requests in them, recorded while somebody asks for it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from torch_mux.runtime.bundle import Bundle

__all__ = ["MOST_BUNDLES", "BundleSpan", "RequestSpan", "Timeline", "recorders"]

#: Bundles that a timeline holds; of more, the oldest are dropped and counted.
MOST_BUNDLES: Final = 200_000


@dataclass(frozen=True)
class RequestSpan:
    """One request of a bundle.

    Attributes:
        tenant: whose request it was.
        arrival: seconds on the engine's clock when it was submitted.
        outcome: "done" or "error".
        late: whether it ended after its ``slo`` or ``deadline``.
    """

    tenant: str
    arrival: float
    outcome: str
    late: bool


@dataclass(frozen=True)
class BundleSpan:
    """One bundle.

    Attributes:
        program: the model's class.
        fingerprint: identity of the program.
        device, lane: where it ran.
        share: its cap, a fraction of the device.
        issued, ended: seconds on the engine's clock when it left the line and when the device had finished.
        seconds: device seconds it took, at the end of that time.
        requests: in slot order.
        reserved: whether its tenants have a reserve.
        mix: the programs that went out as one, of which this is one; "" where it went out by itself.
        leads: whether it stands for all of them in a picture of the lane.
        whole: device seconds of all of them.
        passes: it went before bundles of other lanes, between two of their segments.
    """

    program: str
    fingerprint: str
    device: str
    lane: int
    share: float
    issued: float
    ended: float
    seconds: float
    requests: tuple[RequestSpan, ...]
    reserved: bool = False
    mix: str = ""
    leads: bool = True
    whole: float = 0.0
    passes: bool = False


class Timeline:
    """Spans in the order in which they ended; safe from any thread."""

    def __init__(self, limit: int = MOST_BUNDLES) -> None:
        self._lock = threading.Lock()
        self._spans: deque[BundleSpan] = deque(maxlen=limit)
        self._seen = 0

    def add(self, bundle: Bundle, ended: float) -> None:
        """A bundle ended; its requests have their states."""
        program = bundle.served.program
        spans = tuple(
            RequestSpan(request.quota.tenant, request.arrival, request.state.value, request.due < ended)
            for request in bundle.requests
        )
        issued = bundle.requests[0].started
        span = BundleSpan(
            program.name,
            program.fingerprint,
            str(program.device),
            bundle.lane,
            bundle.share,
            issued,
            ended,
            bundle.seconds,
            spans,
            bundle.issue.reserved,
            bundle.mix,
            bundle.leads,
            bundle.whole,
            bundle.issue.passes,
        )
        with self._lock:
            self._spans.append(span)
            self._seen += 1

    @property
    def spans(self) -> list[BundleSpan]:
        """What was recorded so far."""
        with self._lock:
            return list(self._spans)

    @property
    def dropped(self) -> int:
        """Bundles that no longer fitted."""
        with self._lock:
            return self._seen - len(self._spans)


class _Recorders:
    """The timelines that are recording; more than one may."""

    def __init__(self) -> None:
        self.active: tuple[Timeline, ...] = ()
        self._lock = threading.Lock()

    @contextmanager
    def record(self, timeline: Timeline) -> Iterator[Timeline]:
        """Has a timeline record every bundle of the process that ends meanwhile."""
        with self._lock:
            self.active = (*self.active, timeline)
        try:
            yield timeline
        finally:
            with self._lock:
                self.active = tuple(one for one in self.active if one is not timeline)


#: Those of the process.
recorders: Final = _Recorders()

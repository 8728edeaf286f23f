"""When the requests of a call would end, before they are accepted."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from torch_mux.runtime.queues import ProgramQueue
from torch_mux.runtime.scheduler.base import Policy
from torch_mux.runtime.scheduler.delays import Delay
from torch_mux.runtime.scheduler.pending import Standing
from torch_mux.types import Quota

__all__ = ["Outlook", "Prospect"]

#: Up to this load whoever comes later overtakes nobody.
_EASY = 0.7


@dataclass(slots=True)
class Prospect:
    """What the requests of a call would be queued behind in one queue.

    Attributes:
        untold: requests of it that go out just now, of which the policy does not know yet.
        limit: most requests of a bundle.
        mutex: guards the queue.
        queued: how many of the call are queued before the next one; the same by tenant.
    """

    queue: ProgramQueue
    policy: Policy
    untold: int
    limit: int
    mutex: threading.Lock
    queued: int = 0
    own: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.queue.asked = True

    def standing(self, quota: Quota) -> Standing:
        """What a new request of a quota finds there."""
        with self.mutex:
            return self.queue.standing(quota)


class Outlook:
    """Asked for each request of a call that has a deadline, in order.

    Args:
        prospect: of the request of an index; None where its plan is not there yet.
        quota: likewise.
        count: requests of the call.
        now: seconds on the clock.

    Attributes:
        foreseen: by index, whom to tell how long the request took, and for how many seconds it was forecast.
    """

    def __init__(
        self,
        prospect: Callable[[int], Prospect | None],
        quota: Callable[[int], Quota],
        count: int,
        now: float,
    ) -> None:
        self._prospect = prospect
        self._quota = quota
        self._count = count
        self._now = now
        self._easy: dict[tuple[ProgramQueue, int, float], tuple[Delay, float] | None] = {}
        self.foreseen: dict[int, tuple[Delay, float]] = {}

    def late(self, index: int, limit: float) -> float | None:
        """Seconds that a request would take, if that may be more than ``limit``; None too if nobody knows."""
        found = self._prospect(index)
        if found is None:
            return None
        quota = self._quota(index)
        key = found.queue, quota.priority, limit
        if key in self._easy:
            known = self._easy[key]
        else:
            known = self._easy[key] = self._all_at_once(found, quota, limit)
        if known is None:
            late, known = self._judged(found, quota, limit)
            if late is not None:
                return late
        if known is not None:
            self.foreseen[index] = known
        found.queued += 1
        found.own[quota.tenant] = found.own.get(quota.tenant, 0) + 1
        return None

    def _all_at_once(self, found: Prospect, quota: Quota, limit: float) -> tuple[Delay, float] | None:
        """What is foreseen for the last of the call, where everything fits one bundle and all is in time."""
        queue, pace = found.queue, found.queue.pace
        most, last = pace.most(found.limit), len(queue.requests) + found.untold + self._count - 1
        load = pace.load(most)
        if last >= most or load > _EASY:
            return None
        seconds = self._seconds(found, last, most)
        if seconds is None:
            return None
        delay = queue.delay(quota.priority)
        return None if delay.most(seconds, limit, load) > limit else (delay, seconds)

    def _judged(
        self, found: Prospect, quota: Quota, limit: float
    ) -> tuple[float | None, tuple[Delay, float] | None]:
        """The seconds for which one is refused, or None; and what is foreseen."""
        queue, pace, own = found.queue, found.queue.pace, found.own.get(quota.tenant, 0)
        most, standing, delay = pace.most(found.limit), found.standing(quota), queue.delay(quota.priority)
        load, rivals = pace.load(most), delay.among(standing.rivals)
        ahead = found.untold + standing.ahead(own, found.queued - own, load, rivals)
        least = self._least(found, ahead)
        if least > limit:
            return least, None
        seconds = self._seconds(found, ahead, most)
        if seconds is None:
            return None, None
        late = delay.late(seconds, limit, load * min(1.0, ahead / most), self._now)
        return (None, (delay, seconds)) if late is None else (late, None)

    def _least(self, found: Prospect, ahead: int) -> float:
        """Device seconds before its end. Where nothing was measured lately somebody has to go first: none."""
        queue, limit = found.queue, found.limit
        slots, bundles = min(limit, ahead + 1), ahead // limit + 1
        end = found.policy.outlook(queue.key, slots, bundles, self._now, queue.reserved)
        return 0.0 if end is None else end - self._now

    def _seconds(self, found: Prospect, ahead: int, most: int) -> float | None:
        seconds = found.queue.pace.seconds(ahead, most, self._now)
        return None if seconds is None else max(seconds, self._least(found, ahead))

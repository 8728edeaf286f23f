"""All that is pending of several programs at once: when that takes nothing from anybody."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from torch_mux.runtime.scheduler.base import Issue, Queue, View
from torch_mux.runtime.scheduler.cohorts import Cohorts
from torch_mux.runtime.scheduler.fair import VirtualTime
from torch_mux.runtime.scheduler.search import at_once
from torch_mux.settings import Settings
from torch_mux.types import Quota

__all__ = ["all_at_once", "even_start"]

_NEVER = float("inf")


def all_at_once(
    view: View,
    lane_of: Callable[[Queue], int | None],
    cohorts: Cohorts,
    now: float,
    settings: Settings,
    start: float | None,
) -> Sequence[Issue]:
    """A bundle of each program; none where one of them has to wait, or something has to be weighed.

    That is so of two classes, too: the bundles need not go out as one, and of a program whose companions are
    of a lower class some would have to stay.

    Args:
        lane_of, cohorts: see :func:`at_once`.
        start: of each issue.
    """
    found: list[Issue] = []
    if len({request.quota.priority for queue in view.queues for request in queue.requests}) > 1:
        return ()
    for queue in view.queues:
        issue = at_once(queue, lane_of, view, cohorts, now, settings, start) if queue.ready else None
        if issue is None:
            return ()
        found.append(issue)
    return found


def even_start(
    queues: Collection[Queue],
    times: Callable[[int], VirtualTime],
    weight: Callable[[Quota], float],
    expected: Mapping[int, float],
    seconds: Callable[[Queue], float],
) -> float | None:
    """The least start tag, where all may go whatever the order: none gets further ahead of it than a bundle.

    Args:
        times: the virtual time of a class.
        expected: by class, the least start tag of those that are expected back.
        seconds: what a bundle of all that is pending of a program will take.

    Returns:
        None where somebody would, or where there are several classes.
    """
    level: int | None = None
    flows: list[tuple[float, float, float, float]] = []
    for queue in queues:
        whole = seconds(queue)
        each = whole / len(queue.requests)
        for (priority, tenant), tickets in queue.flows().items():
            if level is None:
                level = priority
            if priority != level:
                return None
            tag = times(priority).arrived(tenant).tag
            flows.append((tag, weight(next(iter(tickets)).quota), (len(tickets) - 1) * each, whole))
    if level is None or any(other != level for other in expected):
        return None
    least = min(expected.get(level, _NEVER), min([tag for tag, _, _, _ in flows]))
    far = [True for tag, each, more, whole in flows if (tag - least) * each + more > whole]
    return None if far else least

"""Which further programs' bundles go out with one, as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from torch_mux.runtime.bundle import Bundle
from torch_mux.runtime.executors.base import Executor
from torch_mux.runtime.request import Request
from torch_mux.runtime.scheduler.base import Decision, Issue, Policy

__all__ = ["as_one", "with_companions"]

_NEVER = float("inf")


def with_companions(
    first: Bundle,
    decide: Callable[[], Decision],
    take: Callable[[Issue], Bundle],
    executor: Executor,
    policy: Policy,
    now: float,
) -> list[Bundle]:
    """``first``, and the bundles that the policy would send out next anyway and that may run with it.

    Nothing waits for companions, and what is not taken is decided on again. They must be of other programs
    that can be packed, on the same lane or another branch, without a cap (beside each other, capped bundles
    of one tenant would take more than his cap), while no reserve is in use, and go before nobody. Where
    somebody has to end by some time, all of them together must be forecast to end before that.

    Args:
        decide: what the policy would do now.
        take: takes an issue's requests out of the line.
    """
    bundles = [first]
    if executor.together < 2 or not _packable(first.issue, executor):
        return bundles
    due = _due(first.requests)
    programs = {first.served.key}
    while len(bundles) < executor.together:
        issue = decide()
        if not isinstance(issue, Issue) or issue.key in programs:
            break
        if issue.lane != first.lane and None in (issue.branch, first.issue.branch):
            break
        if not _packable(issue, executor):
            break
        due = min(due, _due(issue.requests))
        if due < _NEVER:
            end = policy.outlook(issue.key, len(issue.requests), 1, now)  # behind those that were taken
            if end is None or end > due:
                break
        programs.add(issue.key)
        bundles.append(take(issue))
    return bundles


def as_one(issues: Sequence[Issue], executor: Executor) -> bool:
    """Whether bundles of different programs may go out as one."""
    lanes, branches = {issue.lane for issue in issues}, [issue.branch for issue in issues]
    return (len(lanes) == 1 or None not in branches) and all(_packable(issue, executor) for issue in issues)


def _packable(issue: Issue, executor: Executor) -> bool:
    served = cast(Request, issue.requests[0]).served
    whole = issue.share >= 1.0 and not issue.reserved and issue.kept == 0.0
    return (
        whole
        and not issue.passes
        and not served.ordered
        and served.retired is None
        and executor.packs(served)
    )


def _due(requests: Sequence[object]) -> float:
    return min((cast(Request, request).due for request in requests), default=_NEVER)

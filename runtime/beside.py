"""Which bundles may be on the device at the same time: a limit holds for all that run beside each other."""

from __future__ import annotations

from torch_mux.runtime.scheduler.base import Issue, share_of

__all__ = ["apart", "limited"]


def limited(issue: Issue) -> bool:
    """Whether a bundle has a tenant with a limit, or has to leave room for a reserve."""
    return issue.share < 1.0 or any(request.quota.sms < 1.0 for request in issue.requests)


def apart(issue: Issue, other: Issue) -> bool:
    """Whether ``issue``, which is :func:`limited`, has to wait for ``other`` on another branch.

    Side by side, two bundles of one tenant would take twice his limit, and two that leave room for a reserve
    would leave none.
    """
    if issue.share < share_of(issue.requests):
        return True
    tenants = {request.quota.tenant for request in issue.requests if request.quota.sms < 1.0}
    return any(request.quota.tenant in tenants for request in other.requests)

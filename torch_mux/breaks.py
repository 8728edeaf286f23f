"""Which graphs belong to one call: a model with graph breaks runs several, and its rate counts calls."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import replace

from torch_mux.types import Quota

__all__ = ["continued"]


class _Call(threading.local):
    """The call that this thread is in, as far as its graphs tell."""

    def __init__(self) -> None:
        self.tenant = ""
        self.open = 0
        self.graphs: set[Hashable] = set()


_call = _Call()


def continued(graph: Hashable, quota: Quota, resumed: bool, breaks: bool) -> Quota:
    """``quota``, without its rate if ``graph`` continues a call that has been counted.

    A frame that ends with a graph break is followed by the graphs of what it calls and by the graph that
    resumes it. What raises in between leaves the call open: the next run of one of its first graphs, or
    another tenant's, is a new call all the same.

    Args:
        graph: what tells it from others, the same when it is compiled again.
        resumed: the graph is one of those that go on after a break.
        breaks: a break follows it.
    """
    if quota.rate is None:
        return quota
    if not _call.open or quota.tenant != _call.tenant or (not resumed and graph in _call.graphs):
        _call.tenant, _call.open, _call.graphs = quota.tenant, int(breaks), {graph}
        return quota
    _call.open += int(breaks) - int(resumed)
    _call.graphs.add(graph)
    return replace(quota, rate=None, burst=None, excess="hold")

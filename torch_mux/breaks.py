"""Which graphs belong to one call: a model with graph breaks runs several, and its rate counts calls."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from types import FrameType

from torch_mux.types import Quota

__all__ = ["continued"]

#: A frame and its code: a frame that has ended may leave its identity to another one.
_Place = tuple[int, int]
#: Modules whose frames are between a compiled function and its graph, as are generated ones without a name.
_BETWEEN = (
    "torch._",
    "torch.autograd.",
    "torch.fx.",
    "torch.utils.",
    "torch_mux.backend",
    "torch_mux.breaks",
)


class _Call(threading.local):
    """Where the last call of this thread broke off that may still go on, and its tenant."""

    place: _Place | None = None
    tenant: str = ""


_call = _Call()


def _places() -> Iterator[_Place]:
    """The function that runs a graph now, and those that called it, outwards."""
    frame: FrameType | None = sys._getframe(1)
    between = True
    while frame is not None:
        name = frame.f_globals.get("__name__")
        between = between and (name is None or name.startswith(_BETWEEN))
        if not between:
            yield id(frame), id(frame.f_code)
        frame = frame.f_back


def continued(quota: Quota, breaks: bool) -> Quota:
    """``quota``, without its rate if the graph that is about to run continues a call that has been counted.

    A frame that ends with a graph break calls what the break is about, and the function that resumes it: as
    long as the frame of a call's first graph is among the callers, the graph is the call's, whatever was
    raised before and whether anything was left to resume.

    Args:
        breaks: a break follows the graph.
    """
    if quota.rate is None:
        return quota
    own, *callers = _places()
    if _call.place is not None and _call.tenant == quota.tenant and _call.place in callers:
        return replace(quota, rate=None, burst=None, excess="hold")
    _call.place, _call.tenant = (own if breaks else None), quota.tenant
    return quota

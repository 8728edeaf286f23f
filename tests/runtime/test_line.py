"""The line of one device: who has left it is forgotten, who moves within it is not."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from simulated_day import Program

from torch_mux.runtime.line import Line
from torch_mux.runtime.request import Request, RequestState
from torch_mux.types import Quota


def _queued(line: Line, quota: Quota, eligible: float = 0.0) -> Request:
    instance: Any = SimpleNamespace(served=Program("net"))
    keeper: Any = None
    request = Request(keeper, instance, (), [torch.zeros(1)], quota, True, 0.0, 0)
    request.eligible = eligible
    line.extend([request])
    return request


@pytest.mark.parametrize("end", ["served", "cancelled while held", "cancelled", "expired"])
def test_who_has_left_the_line_is_kept_by_no_alarm(end: str) -> None:
    line = Line()
    expires = end == "expired"
    request = _queued(line, Quota("a", deadline=1.0) if expires else Quota("a"), 0.0 if expires else 1.0)
    if end == "cancelled while held":
        line.take_out([request])
    assert line.ring(2.0) == ([request] if expires else [])  # the only alarm there is rings
    if end == "served":
        line.take_bundle([request])
    if end == "cancelled":
        line.take_out([request])
    assert line.pending == 0
    kept = weakref.ref(request.outputs[0])
    del request
    gc.collect()
    assert kept() is None


def test_a_clock_that_is_put_back_moves_nobody_who_has_left() -> None:
    line = Line()
    gone, waiting = _queued(line, Quota("a"), 1.0), _queued(line, Quota("a", deadline=5.0), 3.0)
    line.ring(2.0)
    line.take_bundle([gone])
    line.ring(1.0)
    assert gone.eligible == 1.0
    assert (waiting.eligible, waiting.expires, waiting.due) == (2.0, 4.0, 4.0)


def test_deadlines_hold_where_pending_requests_move_to_other_queues() -> None:
    line = Line()
    request = _queued(line, Quota("a", reserve=0.5, deadline=1.0))
    former = line.queue_of(request)
    line.keep_apart(False)
    assert line.queue_of(request) is not former
    assert line.pending == 1
    assert line.ring(2.0) == [request]
    assert request.state is RequestState.EXPIRED

"""``torch_mux.trace``: a timeline of tenants and bundles that Perfetto and ``chrome://tracing`` show.

The format is Chrome's trace events (JSON), which https://ui.perfetto.dev reads: each device is a process
whose threads are its lanes, with a slice a bundle; the tenants are threads of one more process, with two
nested slices a request, from its arrival to its end and the part that it spent in its bundle.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from torch_mux import state
from torch_mux.runtime.timeline import BundleSpan, Timeline, recorders

__all__ = ["events", "trace"]

_TENANTS = 1
_PATIENCE = 1.0
_NAP = 1e-3


@contextmanager
def trace(path: str | os.PathLike[str] | None = None) -> Iterator[Timeline]:
    """Records every bundle of the process that ends inside, from all threads.

    At the end it waits for the bundles that are under way, a second at most.

    Args:
        path: where the timeline is written at the end, also after an exception; nowhere by default.

    Yields:
        The timeline; its ``spans`` are plain data. It holds the last 200,000 bundles, ``dropped`` counts the
        others.

    Raises:
        OSError: ``path`` cannot be written.
    """
    with recorders.record(Timeline()) as timeline:
        try:
            yield timeline
        finally:
            _await_ends()
            if path is not None:
                spans = timeline.spans
                written = {"traceEvents": events(spans), "otherData": _about(spans)}
                Path(path).write_text(json.dumps(written))


def _about(spans: Iterable[BundleSpan]) -> dict[str, str]:
    """Where it was recorded."""
    devices = sorted({span.device for span in spans})
    names = [torch.cuda.get_device_name(each) if each.startswith("cuda") else each for each in devices]
    return {"on": " and ".join(names) or "no device", "torch": torch.__version__}


def _await_ends() -> None:
    """Returns when what is under way has ended and is recorded, or after a while where more keeps coming."""
    engine, last = state.peek(), time.monotonic() + _PATIENCE
    while engine is not None and time.monotonic() < last:
        engine.stats()
        if not any(device.flying for device in engine.health().devices):
            return
        time.sleep(_NAP)


def events(spans: Iterable[BundleSpan]) -> list[dict[str, Any]]:
    """Chrome trace events of these bundles; times are in microseconds on the engine's clock."""
    found: list[dict[str, Any]] = []
    places = _Places(found)
    number = 0
    for bundle, span in enumerate(spans):
        took = span.whole if span.mix else span.seconds
        began = span.ended - took
        where = places.lane(span)
        tenants = sorted({request.tenant for request in span.requests})
        about = {"bundle": bundle, "share": span.share, "tenants": tenants, "program": span.fingerprint[:12]}
        name = span.mix or f"{span.program} x{len(span.requests)}"
        if span.leads:
            found.append(_slice(where, name, began, took) | {"args": about})
        for request in span.requests:
            number += 1
            track = places.tenant(request.tenant)
            outcome = "late" if request.late and request.outcome == "done" else request.outcome
            told = {"bundle": bundle, "outcome": outcome, "queued ms": (began - request.arrival) * 1e3}
            for label, start, seconds in (
                (span.program, request.arrival, span.ended - request.arrival),
                ("in its bundle", began, took),
            ):
                both = {"cat": "request", "id": number, "name": label, **track}
                found.append({**both, "ph": "b", "ts": start * 1e6, "args": told})
                found.append({**both, "ph": "e", "ts": (start + seconds) * 1e6})
    return found


def _slice(where: dict[str, int], name: str, start: float, seconds: float) -> dict[str, Any]:
    return {"ph": "X", "cat": "bundle", "name": name, "ts": start * 1e6, "dur": seconds * 1e6, **where}


class _Places:
    """Process and thread numbers, with their names as events of their own."""

    def __init__(self, found: list[dict[str, Any]]) -> None:
        self._found = found
        self._devices: dict[str, int] = {}
        self._threads: dict[tuple[int, object], int] = {}
        self._name("process_name", {"pid": _TENANTS}, "tenants")

    def _name(self, kind: str, where: dict[str, int], name: str) -> None:
        self._found.append({"ph": "M", "name": kind, **where, "args": {"name": name}})

    def _thread(self, process: int, key: object, name: str) -> dict[str, int]:
        number = self._threads.get((process, key))
        where = {"pid": process, "tid": number or len(self._threads) + 1}
        if number is None:
            self._threads[process, key] = where["tid"]
            self._name("thread_name", where, name)
        return where

    def lane(self, span: BundleSpan) -> dict[str, int]:
        process = self._devices.get(span.device)
        if process is None:
            process = self._devices[span.device] = _TENANTS + 1 + len(self._devices)
            self._name("process_name", {"pid": process}, span.device)
        kind = " (reserve)" if span.reserved else " (overtakes)" if span.passes else ""
        return self._thread(process, span.lane, f"lane {span.lane}{kind}")

    def tenant(self, tenant: str) -> dict[str, int]:
        return self._thread(_TENANTS, tenant, tenant)

"""Where the host time of one ``gather`` goes."""

from __future__ import annotations

import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch_mux import api
from torch_mux.bench.contenders import Contender, synchronize
from torch_mux.bench.workloads import Tenants
from torch_mux.routes import Route
from torch_mux.runtime.engine import Engine

__all__ = ["PARTS", "gather_parts"]

#: Parts of a ``gather`` of learned calls and the functions that do them.
PARTS: dict[str, tuple[Any, str]] = {
    "prepare": (api, "prepare_all"),  # arguments flattened, their signature looked up
    "submit": (Engine, "submit_all"),  # outputs allocated, requests queued
    "launch": (Engine, "wait"),  # rows written, the bundle enqueued; on a CPU, run
    "checks": (Route, "unchanged"),  # whether the model is as it was when the call was learned
    "finish": (Route, "finish"),  # results nested as the model returns them
}


@contextmanager
def _clocked(spent: dict[str, float]) -> Iterator[None]:
    """Adds up the seconds inside each part; what one part calls of another counts for the caller alone."""
    inside: list[str] = []

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if inside:
                return function(*args, **kwargs)
            inside.append(name)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - start
                inside.pop()

        return call

    patches = [
        mock.patch.object(owner, name, timed(part, getattr(owner, name)))
        for part, (owner, name) in PARTS.items()
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def gather_parts(contender: Contender, tenants: Tenants, count: int, rounds: int = 50) -> dict[str, float]:
    """Median host microseconds of one round by part, ``total`` and what is left as ``other``.

    The device is idle when a round starts. Guarded calls go through Dynamo, not through the parts: their time
    is under ``other``.
    """
    rows: Sequence[Any] = [row[:count] for row in tenants.requests]
    found: dict[str, list[float]] = defaultdict(list)
    contender.round(rows[0])
    for index in range(rounds):
        synchronize(rows[0])
        spent: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        with _clocked(spent):
            start = time.perf_counter()
            answers = contender.round(rows[index % len(rows)])
            total = time.perf_counter() - start
        del answers
        for part, seconds in {**spent, "other": total - sum(spent.values()), "total": total}.items():
            found[part].append(1e6 * seconds)
    return {part: round(statistics.median(times), 2) for part, times in found.items()}

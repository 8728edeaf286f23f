"""What a bundle size costs that was never seen before."""

from __future__ import annotations

import itertools
import time
from typing import Any

from torch_mux import state
from torch_mux.bench.measures.stage import Stage

__all__ = ["unseen_size"]

_WANTED = 3
_CANDIDATES = (3, 5, 7, 9, 11, 13, 6, 10)


def unseen_size(stage: Stage) -> dict[str, Any]:
    """For some sizes: the first round, the wait until all is captured, and a round after that, in ms.

    The wait is beside the request path: the first round has been answered by then.
    """
    known = stage.captured | set(stage.counts)
    found = {}
    for size in [each for each in _CANDIDATES if each not in known][:_WANTED]:
        marks = [time.perf_counter()]
        stage.ask(size)
        marks.append(time.perf_counter())
        state.engine().quiesce()
        marks.append(time.perf_counter())
        stage.ask(size)
        marks.append(time.perf_counter())
        first, capture, later = (1e3 * (b - a) for a, b in itertools.pairwise(marks))
        found[size] = {
            "first_round_ms": round(first, 3),
            "capture_ms": round(capture, 3),
            "later_round_ms": round(later, 3),
            "captured": size in stage.captured,
        }
    if not found:
        raise RuntimeError(f"all of {', '.join(map(str, _CANDIDATES))} have been captured before")
    return {"sizes": found}

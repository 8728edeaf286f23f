"""What is measured of ours beside the times of rounds, by the names of the command line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch_mux.bench import measure
from torch_mux.bench.floor import round_floor
from torch_mux.bench.measures.caps import caps
from torch_mux.bench.measures.clients import clients
from torch_mux.bench.measures.launches import launches
from torch_mux.bench.measures.size import unseen_size
from torch_mux.bench.measures.stage import Stage
from torch_mux.bench.measures.tenant import further_tenant, memory

__all__ = ["MEASURES", "ROUNDS", "Stage"]

#: The times of rounds, of every contender.
ROUNDS = "rounds"


def _floors(stage: Stage) -> dict[str, Any]:
    """What the device could not be faster than, by number of tenants."""
    device = measure.device_name(stage.tenants.device)
    return {"floors": {count: round_floor(stage.tenants, count, device).data() for count in stage.counts}}


#: In the order in which they are taken: what captures further sizes comes after what must not have seen them.
MEASURES: dict[str, Callable[[Stage], dict[str, Any]]] = {
    "floor": _floors,
    "launches": launches,
    "size": unseen_size,
    "tenant": further_tenant,
    "caps": caps,
    "clients": clients,
    "memory": memory,
}

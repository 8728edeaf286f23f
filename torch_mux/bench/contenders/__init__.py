"""Ours and the peers: ways to answer one request of every tenant.

Every contender takes changing inputs and returns fresh tensors; the peers pay the same copies.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from torch_mux.bench.contenders.base import Arguments, Contender, NotApplicable, SelfTimed, synchronize
from torch_mux.bench.contenders.graphs import ForkedGraph, GraphEach, GraphStreams
from torch_mux.bench.contenders.inductor import FROZEN, PLAIN, TUNED, Eager, OneByOne, inductor_callables
from torch_mux.bench.contenders.ours import Mux
from torch_mux.bench.contenders.processes import MPSProcesses, Processes
from torch_mux.bench.contenders.stacked import BatchLinear, Shared, Vmapped

__all__ = [
    "CONTENDERS",
    "Arguments",
    "Contender",
    "Eager",
    "Mux",
    "NotApplicable",
    "OneByOne",
    "SelfTimed",
    "default_contenders",
    "inductor_callables",
    "synchronize",
]


def _contenders() -> dict[str, Callable[[], Contender]]:
    found: dict[str, Callable[[], Contender]] = {"eager": Eager, "inductor": OneByOne}
    for flavour in (PLAIN, FROZEN, TUNED):
        for key, kind in (("graphs", GraphEach), ("streams", GraphStreams), ("forked", ForkedGraph)):
            found[f"{key}-{flavour.name}".rstrip("-")] = partial(kind, flavour)
    found |= {"vmap": Vmapped, "batch-linear": BatchLinear, "sliced": Processes, "mps": MPSProcesses}
    return found | {"shared": Shared, "mux": Mux, "mux-raw": partial(Mux, raw=True)}


#: By the names of the command line; ours last.
CONTENDERS: dict[str, Callable[[], Contender]] = _contenders()


def default_contenders(device: torch.device) -> list[str]:
    """The peers that are quick to prepare on a device, and ours."""
    return ["graphs", "forked", "mux"] if device.type == "cuda" else ["eager", "inductor", "mux"]

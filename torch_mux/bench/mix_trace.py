"""A timeline of a few rounds of a mix, each request under its model's name, and the explanation then."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch_mux
from torch_mux.bench.mix_contenders import MuxMix, settle
from torch_mux.bench.mix_rows import Row
from torch_mux.bench.workloads import Tenants

__all__ = ["traced"]

_ROUNDS: Final = 3


def traced(contender: MuxMix, row: Row, tenants: Tenants, path: Path) -> None:
    """Writes the timeline to ``path``, and beside it, with the suffix ``.txt``, the explanation.

    Args:
        contender: prepared for these tenants.
    """
    names = [f"{name} {number}" for name, count in row.members for number in range(count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    settle(contender, tenants)
    _rounds(contender, tenants, names)  # names are admitted
    with torch_mux.trace(path):
        _rounds(contender, tenants, names)
    path.with_suffix(".txt").write_text(f"{torch_mux.explain()}\n")


def _rounds(contender: MuxMix, tenants: Tenants, names: list[str]) -> None:
    scopes = [torch_mux.quota(name) for name in names]
    for requests in tenants.requests[:_ROUNDS]:
        items = zip(scopes, contender.models, requests, strict=True)
        futures = torch_mux.submit_all(*((scope, model, *given) for scope, model, given in items))
        for future in futures:
            future.result()

"""Ours: ``torch_mux.gather`` over models compiled with ``backend="mux"``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import torch_mux
from torch_mux import state
from torch_mux.bench.contenders.base import Arguments, Peer, synchronize
from torch_mux.bench.workloads import Tenants

__all__ = ["Mux"]


class Mux(Peer):
    """``torch_mux.gather`` over models compiled with ``backend="mux"``."""

    def __init__(self, raw: bool = False, patience: float = 180.0) -> None:
        self.name = "torch-mux gather, model's own output" if raw else "torch-mux gather"
        self.raw = raw
        self.patience = patience
        self.models: list[Any] = []
        self.recorded: dict[str, object] = {}

    def served(self, tenants: Tenants) -> list[nn.Module]:
        """The models as they are compiled: their own output, or the compared tensor alone."""
        return tenants.models if self.raw or tenants.workload.returns_tensor else tenants.tensor_only()

    def prepare(self, tenants: Tenants, counts: Sequence[int]) -> None:
        self.models = [torch.compile(model, backend="mux") for model in self.served(tenants)]
        for count in counts:
            requests = tenants.requests[0][:count]
            share = self.settle(requests)
            self.recorded[f"coalesced share at {count}"] = share
        # What compiles in the background would share the interpreter with what is timed.
        if not state.engine().quiesce(self.patience, ahead=True):
            raise TimeoutError(f"still compiling ahead after {self.patience:.0f} s")
        self.recorded["explain"] = str(torch_mux.explain())

    def settle(self, requests: Arguments) -> float | None:
        """Rounds until one changes nothing: all is compiled and captured; at most ``patience`` seconds.

        Returns the share of the last round that went out coalesced with others.

        Raises:
            TimeoutError: it was still compiling or capturing then.
        """
        deadline = time.monotonic() + self.patience
        before: tuple[object, ...] | None = None
        while True:
            tenant = f"bench-settle-{len(requests)}-{time.monotonic_ns()}"
            with torch_mux.quota(tenant):
                self.round(requests)
            synchronize(requests)
            if not state.engine().quiesce(max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"still compiling or capturing after {self.patience:.0f} s")
            got = torch_mux.stats().tenants.get(tenant)
            share = None if got is None else got.coalesced_share
            programs = torch_mux.explain().programs
            now = (share, *((program.fingerprint, program.captured) for program in programs))
            if now == before:
                return share
            before = now

    def round(self, requests: Arguments) -> Sequence[Any]:
        return torch_mux.gather(*[(model, *args) for model, args in zip(self.models, requests, strict=False)])

    def notes(self) -> dict[str, object]:
        return self.recorded

    def release(self) -> None:
        for model in self.models:
            torch_mux.remove(model)
        self.models = []

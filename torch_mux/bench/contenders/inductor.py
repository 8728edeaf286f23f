"""Inductor's code of each tenant, called one after another, and the models as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from torch_mux import compat
from torch_mux.bench.contenders.base import Arguments, Peer
from torch_mux.bench.workloads import Tenants

__all__ = ["FROZEN", "PLAIN", "TUNED", "Eager", "Flavour", "OneByOne", "inductor_callables"]


@dataclass(frozen=True)
class Flavour:
    """Inductor with some of its settings.

    Attributes:
        name: as part of a contender's key.
        words: as part of a contender's name.
        options: of ``torch.compile``.
    """

    name: str
    words: str
    options: dict[str, Any] = field(default_factory=dict)


PLAIN: Final = Flavour("", "inductor")
#: Parameters are constants, so batch norm is folded and siblings are joined: a compile for every tenant.
FROZEN: Final = Flavour("frozen", "inductor with freezing", {"freezing": True})
#: What ``mode="max-autotune-no-cudagraphs"`` stands for: CUDA graphs are the contender's.
TUNED: Final = Flavour(
    "tuned", "inductor with max-autotune", {"max_autotune": True, "coordinate_descent_tuning": True}
)


def inductor_callables(tenants: Tenants, flavour: Flavour = PLAIN) -> list[Callable[..., Tensor]]:
    """Each tenant's model under ``torch.compile``, compiled once for all peers, and called once.

    Where one peer is interrupted, the next goes on from there.

    Raises:
        Exception: what the compiler raises.
    """
    found = tenants.compiled.setdefault(flavour.name, [])
    pairs = list(zip(tenants.tensor_only(), tenants.requests[0], strict=True))
    with compat.inductor_settings(**flavour.options):
        for model, args in pairs[len(found) :]:
            call = torch.compile(model, dynamic=False, options=flavour.options or None)
            call(*args)
            found.append(call)
    return found[: len(pairs)]


class OneByOne(Peer):
    """``torch.compile`` with its default backend, called one tenant after another."""

    name = "inductor, one after another"

    def __init__(self) -> None:
        self.callables: list[Callable[..., Tensor]] = []

    def prepare(self, tenants: Tenants, counts: Sequence[int]) -> None:
        self.callables = inductor_callables(tenants)

    def round(self, requests: Arguments) -> Sequence[Any]:
        return [call(*args) for call, args in zip(self.callables, requests, strict=False)]

    def release(self) -> None:
        self.callables = []


class Eager(OneByOne):
    """The models as they are, one after another."""

    name = "eager, one after another"

    def prepare(self, tenants: Tenants, counts: Sequence[int]) -> None:
        self.callables = list(tenants.tensor_only())

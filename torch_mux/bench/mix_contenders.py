"""The ways to answer a round of several architectures: peers, and ours under settings of their own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

import torch_mux
from torch_mux import state
from torch_mux.bench.contenders import CONTENDERS as PEERS
from torch_mux.bench.contenders import Contender, Mux, NotApplicable
from torch_mux.bench.contenders.base import Arguments
from torch_mux.bench.workloads import Tenants

__all__ = ["CONTENDERS", "JOINED", "OURS", "OWN", "MuxMix", "Padded", "mask_of", "name_of", "settle"]

_TURNS: Final = 30


class MuxMix(Mux):
    """``torch_mux.gather`` under settings of its own."""

    def __init__(self, name: str, **settings: Any) -> None:
        super().__init__()
        self.name = name
        self.settings = settings

    def prepare(self, tenants: Tenants, counts: Sequence[int]) -> None:
        self.activate()
        super().prepare(tenants, counts)
        requests = tenants.requests[0][: max(counts)]
        self.goes_on(requests)
        for _ in range(
            _TURNS if self.settings["pack_after"] else 4
        ):  # both ways are measured, or it is built
            self.round(requests)
            state.engine().quiesce(self.patience)

    def goes_on(self, requests: Arguments) -> None:
        """Rounds until a mix has come again for long enough to be built."""
        until = time.monotonic() + 1.25 * self.settings["pack_after"]
        while time.monotonic() < until:
            self.round(requests)

    def notes(self) -> dict[str, Any]:
        return {**super().notes(), "mixes": [vars(mix) for mix in torch_mux.explain().mixes]}

    def activate(self) -> None:
        """Has the settings in force from the next round on; a mix that is not built yet is built first."""
        if {name: getattr(state.settings(), name) for name in self.settings} != self.settings:
            torch_mux.configure(**self.settings)

    def release(self) -> None:
        """The models stay: other contenders serve them too."""
        self.models = []


def mask_of(length: int, longest: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to attention's scores of so many tokens and padding behind them: [1, 1, 1, longest]."""
    mask = torch.zeros((1, 1, 1, longest), dtype=dtype, device=device)
    mask[..., length:] = torch.finfo(dtype).min
    return mask


class Padded(MuxMix):
    """Token sequences padded to the longest, so that all are one program; masked, so that answers are right.

    A round copies its tokens behind each other's padding in two launches; masks are there before.
    """

    def prepare(self, tenants: Tenants, counts: Sequence[int]) -> None:
        """See ``Contender``.

        Raises:
            NotApplicable: a model takes something else than one sequence of tokens.
        """
        shapes = [[x.shape for x in request] for request in tenants.requests[0]]
        integers = all(not x.is_floating_point() for request in tenants.requests[0] for x in request)
        if not integers or any(len(own) != 1 or len(own[0]) != 2 for own in shapes):
            raise NotApplicable("only models of token sequences can be padded")
        self._lengths = [int(own[0][1]) for own in shapes]
        longest, dtype = max(self._lengths), next(tenants.models[0].parameters()).dtype
        tokens = tenants.requests[0][0][0]
        self._rows = [tokens.new_zeros((1, longest)) for _ in shapes]
        self._masks = [mask_of(length, longest, dtype, tokens.device) for length in self._lengths]
        super().prepare(tenants, counts)

    def round(self, requests: Arguments) -> Sequence[Any]:
        rows = self._rows[: len(requests)]
        parts = [row[:, :length] for row, length in zip(rows, self._lengths, strict=False)]
        torch._foreach_copy_(parts, [tokens for (tokens,) in requests])
        answers = super().round(list(zip(rows, self._masks, strict=False)))
        return [answer[:, :length] for answer, length in zip(answers, self._lengths, strict=False)]


def _ours(name: str, kind: type[MuxMix] = MuxMix, **settings: Any) -> Callable[[], Contender]:
    """A contender under these settings, and all others that matter here as they are by default."""
    plain = {"pack": 1, "branches": None, "beside": None, "match": True, "pack_after": 0.0}
    return lambda: kind(name, **{**plain, **settings})


CONTENDERS: dict[str, Callable[[], Contender]] = {
    **{key: PEERS[key] for key in ("inductor", "graphs", "forked")},
    "padded": _ours("torch-mux, padded to the longest, coalesced", Padded),
    "serial": _ours("torch-mux, own plans, one after another", branches=1),
    "branches": _ours("torch-mux, own plans on branches"),
    "parts": _ours("torch-mux, own plans on branches, parts by time", beside=1.0),
    "wide": _ours("torch-mux, own plans on branches, twice the parts", beside=2.0),
    "beside": _ours("torch-mux, own plans, capped, one graph", pack=12, match=False),
    "packed": _ours("torch-mux, packed", pack=12),
    "auto": _ours("torch-mux, branches or packed, by measurement", pack=12, pack_after=0.2),
}
#: Ours without launches for several programs; and with.
OWN: Final = ("serial", "branches", "parts", "wide", "beside")
JOINED: Final = ("packed", "auto")
OURS: Final = (*OWN, *JOINED)


def name_of(key: str) -> str:
    """What a contender is called in the record."""
    return CONTENDERS[key]().name


def settle(contender: Contender, tenants: Tenants) -> None:
    """Has a contender of ours under its settings, and what they build built."""
    if isinstance(contender, MuxMix):
        contender.activate()
        contender.goes_on(tenants.requests[0])
        for _ in range(_TURNS if contender.settings["pack_after"] else 3):
            contender.round(tenants.requests[0])
            state.engine().quiesce(contender.patience)

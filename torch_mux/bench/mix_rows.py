"""The workloads of the benchmark of mixes: which architectures, for how many tenants."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torch_mux.bench.vision import import_torchvision
from torch_mux.bench.workloads import (
    WORKLOADS,
    Tenants,
    TensorOnly,
    Workload,
    as_is,
    build,
    images,
    origin_of,
    tokens,
    varied,
)

__all__ = ["ROWS", "Pool", "Row", "base_of", "longest_of", "workload_of"]

_VOCABULARIES = {"bert": 30522, "tiny-encoder": 50}
_LENGTHS = (16, 48, 48, 64, 96, 96, 128, 128, 160, 192, 224, 256, 256, 320, 352, 384)
_FORKED = ("forked",)


@dataclass(frozen=True)
class Row:
    """One workload of the table.

    Attributes:
        members: (name of an architecture, tenants that have it).
        peers: (contenders, how many times faster ours is to be than the fastest of these) on an H100.
        own: the same of launches for several programs against our own plans.
    """

    name: str
    members: tuple[tuple[str, int], ...]
    peers: tuple[tuple[str, ...], float] | None = None
    own: float | None = None

    @property
    def tenants(self) -> int:
        """Of all architectures."""
        return sum(count for _, count in self.members)


ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row("four", (("resnet50", 4), ("vit", 4), ("bert", 4), ("mobilenet", 4)), (_FORKED, 2.6), 1.25),
        Row("encoders", (("vit", 8), ("bert", 8)), (_FORKED, 2.8), 1.15),
        Row(
            "lengths",
            tuple((f"bert-{length}", _LENGTHS.count(length)) for length in dict.fromkeys(_LENGTHS)),
            (("padded", "forked"), 1.5),
        ),
        Row(
            "cnns",
            tuple(
                (name, 2)
                for name in (
                    *("resnet18", "resnet34", "resnet50", "regnet_y_1_6gf", "efficientnet_b0", "densenet121"),
                )
            ),
            (_FORKED, 1.8),
            1.15,
        ),
        Row("tiny-lengths", tuple((f"tiny-encoder-{length}", 1 + length % 2) for length in (5, 8, 9, 12))),
        Row("tiny", (("tiny-cnn", 2), ("tiny-mlp", 2), ("tiny-mixer", 1))),
    )
}


def base_of(name: str) -> str:
    """An architecture without the length of its inputs."""
    encoder, _, length = name.rpartition("-")
    return encoder if encoder in _VOCABULARIES and length.isdigit() else name


def longest_of(row: Row) -> str | None:
    """The member with the longest inputs, where all are one encoder at lengths of their own."""
    names = [name for name, _ in row.members]
    if len({base_of(name) for name in names}) > 1 or any(base_of(name) == name for name in names):
        return None
    return max(names, key=lambda name: int(name.rpartition("-")[2]))


def workload_of(name: str) -> Workload:
    """An architecture by its name: one of ``WORKLOADS``, an encoder's with ``-LENGTH``, or torchvision's."""
    if name in WORKLOADS:
        return WORKLOADS[name]
    encoder = base_of(name)
    if encoder != name:
        base = WORKLOADS[encoder]
        inputs = tokens(int(name.rpartition("-")[2]), _VOCABULARIES[encoder])
        if base.returns_tensor:
            return Workload(name, base.model, inputs, as_is)
        return Workload(name, lambda: TensorOnly(base.model(), base.tensor).eval(), inputs, as_is)
    return Workload(
        name, lambda: varied(import_torchvision().models.get_model(name).eval()), images(224), as_is
    )


class Pool:
    """The models of all rows, each architecture built once."""

    def __init__(self, rows: Sequence[Row], device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._most: dict[str, int] = {}
        for row in rows:
            for name, count in row.members:
                self._most[name] = max(count, self._most.get(name, 0))
        self._built: dict[str, Tenants] = {}
        self._origins: dict[str, nn.Module] = {}
        self._numbers: Counter[str] = Counter()

    def _build(self, name: str) -> Tenants:
        """Models with weights of their own, also where others have them at other sizes."""
        workload, base, count = workload_of(name), base_of(name), self._most[name]
        with torch.inference_mode(False):  # writes to weights made under it cannot be noticed
            if base not in self._origins:
                self._origins[base] = origin_of(workload, self._device, self._dtype)
            first, origin = self._numbers[base], self._origins[base]
            self._numbers[base] += count
            return build(workload, count, self._device, self._dtype, first=first, origin=origin)

    def tenants(self, row: Row) -> Tenants:
        """The tenants of a row, one architecture after the other."""
        models: list[nn.Module] = []
        requests: list[list[tuple[Tensor, ...]]] = []
        for name, count in row.members:
            own = self._built.get(name)
            if own is None:
                own = self._built[name] = self._build(name)
            models += own.models[:count]
            requests = requests or [[] for _ in own.requests]
            for mixed, variant in zip(requests, own.requests, strict=True):
                mixed += variant[:count]
        first = workload_of(row.members[0][0])
        return Tenants(Workload(row.name, first.model, first.inputs, as_is), models, requests)

"""The workloads of the benchmark of mixes: which architectures, for how many tenants."""

from __future__ import annotations

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
    tokens,
    varied,
)

__all__ = ["ROWS", "Pool", "Row", "workload_of"]

_VOCABULARIES = {"bert": 30522, "tiny-encoder": 50}
_LENGTHS = (16, 48, 48, 64, 96, 96, 128, 128, 160, 192, 224, 256, 256, 320, 352, 384)


@dataclass(frozen=True)
class Row:
    """One workload of the table.

    Attributes:
        members: (name of an architecture, tenants that have it).
    """

    name: str
    members: tuple[tuple[str, int], ...]

    @property
    def tenants(self) -> int:
        """Of all architectures."""
        return sum(count for _, count in self.members)


ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row("four", (("resnet50", 4), ("vit", 4), ("bert", 4), ("mobilenet", 4))),
        Row("encoders", (("vit", 8), ("bert", 8))),
        Row(
            "lengths",
            tuple((f"bert-{length}", _LENGTHS.count(length)) for length in dict.fromkeys(_LENGTHS)),
        ),
        Row(
            "cnns",
            tuple(
                (name, 2)
                for name in (
                    *("resnet18", "resnet34", "resnet50", "regnet_y_1_6gf", "efficientnet_b0", "densenet121"),
                )
            ),
        ),
        Row("tiny-lengths", tuple((f"tiny-encoder-{length}", 1 + length % 2) for length in (5, 8, 9, 12))),
        Row("tiny", (("tiny-cnn", 2), ("tiny-mlp", 2), ("tiny-mixer", 1))),
    )
}


def workload_of(name: str) -> Workload:
    """An architecture by its name: one of ``WORKLOADS``, an encoder's with ``-LENGTH``, or torchvision's."""
    if name in WORKLOADS:
        return WORKLOADS[name]
    encoder, _, length = name.rpartition("-")
    if encoder in _VOCABULARIES and length.isdigit():
        base = WORKLOADS[encoder]
        inputs = tokens(int(length), _VOCABULARIES[encoder])
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

    def tenants(self, row: Row) -> Tenants:
        """The tenants of a row, one architecture after the other."""
        models: list[nn.Module] = []
        requests: list[list[tuple[Tensor, ...]]] = []
        for name, count in row.members:
            own = self._built.get(name)
            if own is None:
                with torch.inference_mode(False):  # writes to weights made under it cannot be noticed
                    own = build(workload_of(name), self._most[name], self._device, self._dtype)
                self._built[name] = own
            models += own.models[:count]
            requests = requests or [[] for _ in own.requests]
            for mixed, variant in zip(requests, own.requests, strict=True):
                mixed += variant[:count]
        first = workload_of(row.members[0][0])
        return Tenants(Workload(row.name, first.model, first.inputs, as_is), models, requests)

"""Plain data that crosses the layers of torch-mux."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any, Protocol

import torch

__all__ = ["CostModel", "FallbackKind", "FallbackReason", "Quota", "TensorSpec"]


@dataclass(frozen=True)
class TensorSpec:
    """Shape, strides (in elements), dtype and device of one tensor of a program."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        """The spec of ``tensor``; symbolic sizes must have been specialised before."""
        return cls(
            tuple(int(size) for size in tensor.shape),
            tuple(int(stride) for stride in tensor.stride()),
            tensor.dtype,
            tensor.device,
        )

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, without gaps that strides may leave."""
        return self.numel * self.dtype.itemsize


class FallbackKind(Enum):
    """Why an operation, a segment or a whole program is not coalesced."""

    NO_RULE = "no batching rule"
    MUTATES_INPUT = "mutates an input, parameter or buffer"
    DYNAMIC_SHAPE = "symbolic or data-dependent shape"
    RANDOM = "draws random numbers"
    EFFECT = "has effects beside its results"
    ALIASED_OUTPUT = "an output shares storage with an input, a parameter or another output"
    SUBCLASS = "tensor subclass or unsupported layout"
    TRAINING = "grad mode is enabled and a tensor requires grad"
    NO_TRITON = "Triton cannot be imported, and the super-kernels are written in it"
    TRAIN_MODE = "it is in train mode"
    COMPILE_FAILED = "the coalesced form did not compile"
    NOT_REACHED = "no graph of the model reached the backend"
    LIMIT = "Dynamo's recompile limit is reached, so it runs in eager PyTorch"
    GIVEN_UP = "Dynamo gave it up, so it runs in eager PyTorch"
    RETIRED = "its coalesced plan turned slow or kept raising and rests"
    GUARDED = "calls stay on the guarded path"


@dataclass(frozen=True)
class FallbackReason:
    """A typed record of one fall-back, printed by ``torch_mux.explain()``."""

    kind: FallbackKind
    target: str
    detail: str = ""

    def __str__(self) -> str:
        tail = f" ({self.detail})" if self.detail else ""
        return f"{self.target}: {self.kind.value}{tail}"


@dataclass(frozen=True)
class Quota:
    """What one tenant is guaranteed and allowed.

    Attributes:
        tenant: name the requests are attributed to.
        sms: hard upper limit, a fraction of the device's SMs in (0, 1].
        reserve: guaranteed share, a fraction in [0, 1].
        weight: share of what is left over, relative to other tenants, > 0.
        slo: latency objective in seconds, or None; what ends later counts as late.
        memory: device memory limit in bytes, or None.
        priority: class; requests of a higher one go out first.
        deadline: seconds after which a request is refused or dropped instead of being served, or None.
        rate: requests a second, or None for no limit.
        burst: requests that may come at once under ``rate``; None for those of one second.
        excess: what becomes of requests above ``rate``: "hold" or "refuse".
        max_pending: most requests queued or under way, or None.
    """

    tenant: str = "default"
    sms: float = 1.0
    reserve: float = 0.0
    weight: float = 1.0
    slo: float | None = None
    memory: int | None = None
    priority: int = 0
    deadline: float | None = None
    rate: float | None = None
    burst: int | None = None
    excess: str = "hold"
    max_pending: int | None = None

    @cached_property
    def timed(self) -> bool:
        """Whether its requests have a moment by which they should have ended."""
        return self.slo is not None or self.deadline is not None

    @cached_property
    def limited(self) -> bool:
        """Whether something is to be checked before a request is accepted."""
        limits = (self.rate, self.max_pending, self.deadline)
        return self.reserve > 0.0 or any(limit is not None for limit in limits)


class CostModel(Protocol):
    """What the runtime knows of the time that launches take; lowering decides by it what to pack."""

    def seconds(self, operations: Sequence[Any], sms: int) -> float:
        """Of one launch that does all of these operations on at most ``sms`` multiprocessors."""
        ...

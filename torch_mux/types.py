"""Plain data that crosses the layers of torch-mux."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

__all__ = ["FallbackKind", "FallbackReason", "Quota", "TensorSpec"]


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
        slo: latency objective in seconds, or None.
        memory: device memory limit in bytes, or None.
        priority: class; requests of a higher one go out first.
    """

    tenant: str = "default"
    sms: float = 1.0
    reserve: float = 0.0
    weight: float = 1.0
    slo: float | None = None
    memory: int | None = None
    priority: int = 0

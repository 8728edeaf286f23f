"""A compiled plan as plain data: everything but Inductor's code, which Inductor's own cache keeps."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch_mux.types import FallbackReason, TensorSpec

from .kernels.code import Code
from .launches import KernelCalls
from .prepare import Prepare
from .storage import Layout

__all__ = ["PlanRecipe", "PlanReport", "StepRecipe"]


@dataclass(frozen=True)
class PlanReport:
    """What ``explain()`` tells about a plan.

    Attributes:
        kernels: super-kernel operations by name.
        fused: operations absorbed into epilogues or into the preparation of an instance.
        inductor: operations in the batched graph that Inductor compiles.
        alone: operations that run per instance.
        counts: how many operations fall back for each reason.
        flops: floating-point operations of one slot (:mod:`torch_mux.lowering.flops`).
        flops_alone: those of them in operations that run per instance.
        segments: "coalesced" or "per instance", in order.
        graph: the rewritten graph of one slot, as text.
    """

    kernels: dict[str, int] = field(default_factory=dict)
    fused: int = 0
    inductor: int = 0
    alone: int = 0
    counts: dict[FallbackReason, int] = field(default_factory=dict)
    flops: int = 0
    flops_alone: int = 0
    segments: tuple[str, ...] = ()
    graph: str = ""


@dataclass(frozen=True)
class StepRecipe:
    """A segment: which values of the running environment it reads and writes.

    Attributes:
        coalesced: whether it reads the tables; otherwise it runs once a slot.
        inputs, results: numbers in the environment.
        parameters: indices of prepared values, for a segment that runs once a slot.
        arguments: one slot's specs of the inputs and then of the parameters.
        specs: one slot's specs of the results.
        slots, rows: the most of each that the code is right for.
        kernels: the super-kernels of a coalesced segment.
        ready: their code at the bundle sizes that are made ready first, on a GPU.
    """

    coalesced: bool
    inputs: tuple[int, ...]
    parameters: tuple[int, ...]
    results: tuple[int, ...]
    arguments: tuple[TensorSpec, ...]
    specs: tuple[TensorSpec, ...]
    slots: int
    rows: int
    kernels: KernelCalls | None = None
    ready: dict[int, tuple[Code, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class PlanRecipe:
    """What a coalesced plan is made of.

    Attributes:
        storage: the key of the storage, which the code names.
        outputs: numbers in the environment, one a tensor output of the program.
        reasons: why operations run per instance, each once.
    """

    storage: str
    prepare: Prepare
    layout: Layout
    steps: tuple[StepRecipe, ...]
    outputs: tuple[int, ...]
    reasons: tuple[FallbackReason, ...]
    report: PlanReport

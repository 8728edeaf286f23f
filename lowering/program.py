"""A program: the canonical ATen graph of one captured frame, weights abstracted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from torch_mux.types import FallbackReason, TensorSpec

from .outputs import Derived

__all__ = ["Program"]


@dataclass(frozen=True, eq=False)
class Program:
    """What instances of one architecture share.

    Attributes:
        fingerprint: hex digest of operations, attributes, shapes, dtypes, strides, aliasing and constants.
        name: the model's class as a person would call it; no part of the identity.
        device: where its tensors live.
        inputs: specs of the request's inputs in order; None for what is not a tensor.
        parameters: specs of parameters and buffers in order.
        outputs: specs of the graph's outputs in order; None for what is not a tensor.
        input_positions: where each input sits in the flat argument list of the graph.
        parameter_positions: where each parameter sits in the flat argument list.
        mutates: whether the graph writes one of its arguments.
        fallback: why the whole program runs per instance, or None.
        graph: the canonical ATen graph; it takes the flat argument list.
        literals: the values of outputs that are plain numbers, by position.
        derived: for each output how it is a view of something else, or None; empty where none is.
        hidden: how many of the last outputs are there for views alone; a caller does not see them.
        artifact: code for the flat argument list that was compiled at capture, where the graph has no static
            form.
    """

    fingerprint: str
    name: str
    device: torch.device
    inputs: tuple[TensorSpec | None, ...]
    parameters: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec | None, ...]
    input_positions: tuple[int, ...]
    parameter_positions: tuple[int, ...]
    mutates: bool
    fallback: FallbackReason | None
    graph: torch.fx.GraphModule
    literals: Mapping[int, object] = field(default_factory=dict)
    derived: tuple[Derived | None, ...] = ()
    hidden: int = 0
    artifact: Callable[[list[Any]], Any] | None = None

    def split(self, args: Sequence[object]) -> tuple[list[object], list[Tensor]]:
        """Divides the graph's flat arguments into (inputs, parameters)."""
        inputs = [args[position] for position in self.input_positions]
        parameters = [cast(Tensor, args[position]) for position in self.parameter_positions]
        return inputs, parameters

    def join(self, inputs: Sequence[object], parameters: Sequence[Tensor]) -> list[object]:
        """The flat argument list again: the reverse of :meth:`split`."""
        flat: list[object] = [None] * (len(inputs) + len(parameters))
        for position, value in zip(self.input_positions, inputs, strict=True):
            flat[position] = value
        for position, parameter in zip(self.parameter_positions, parameters, strict=True):
            flat[position] = parameter
        return flat

    def derive(self, outputs: list[object], inputs: Sequence[object], parameters: Sequence[Tensor]) -> None:
        """Puts the outputs that are views into their places."""
        for position, derived in enumerate(self.derived):
            if derived is not None:
                outputs[position] = derived.of(inputs, parameters, outputs)

    def visible(self, outputs: list[object]) -> list[object]:
        """What a caller of the graph gets."""
        return outputs[: -self.hidden] if self.hidden else outputs

"""One-dimensional and transposed convolutions become plain two-dimensional ones.

A transposed convolution of stride s is s by s plain convolutions, one for each phase of its output, whose
results interleave (Shi et al., arXiv 1609.05158). Here they are one convolution with s by s times the output
channels over the window that all phases read together; a tap that a phase does not have is zero. Where the
kernel tiles the image, as in a U-Net, the window is one pixel and nothing is multiplied by zero. The weight
is prepared once an instance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from torch_mux.settings import Settings

from ..graphs import call_nodes, emit, fresh_meta, shape_of
from ..ops.semantic import CONVOLUTION, Convolution

__all__ = ["run"]

aten = torch.ops.aten


def _lifted(node: Node) -> Node:
    """The convolution over [B, C, L] as one over [B, C, 1, L]."""
    call, graph = Convolution.of(node), node.graph

    def lift(value: Any) -> Any:
        return None if value is None else emit(graph, aten.unsqueeze.default, (value, 2))

    with graph.inserting_before(node):
        flat = call._replace(
            x=lift(call.x), weight=lift(call.weight), residual=lift(call.residual), stride=[1, *call.stride],
            padding=[0, *call.padding], dilation=[1, *call.dilation],
            output_padding=[0, *call.output_padding],
        )  # fmt: skip
        return emit(graph, aten.squeeze.dim, (emit(graph, CONVOLUTION, tuple(flat)), 2))


@dataclass(frozen=True)
class _Phases:
    """One axis of a transposed convolution: output s·q + phase reads inputs q + first … q + first + window.

    Attributes:
        taps: for each phase and place in the window the tap there; one past the last where there is none.
        first: the window's first input pixel relative to q.
        padding: zeros on either side of the input, as few as all windows need.
        size: output pixels.
    """

    stride: int
    kernel: int
    taps: tuple[tuple[int, ...], ...]
    first: int
    padding: int
    size: int

    @property
    def window(self) -> int:
        return len(self.taps[0])

    @property
    def steps(self) -> int:
        return -(-self.size // self.stride)

    @property
    def start(self) -> int:
        """Which position of the plain convolution is q = 0."""
        return self.padding + self.first


def _phases(call: Convolution, axis: int) -> _Phases:
    size, kernel = shape_of(call.x)[axis + 2], shape_of(call.weight)[axis + 2]
    stride, padding, dilation = call.stride[axis], call.padding[axis], call.dilation[axis]
    whole = (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1 + call.output_padding[axis]
    # output o = stride * i - padding + dilation * k, so phase o % stride reads i = q + shift by tap k
    reads = {
        (phase, (phase + padding - dilation * tap) // stride): tap
        for phase in range(stride)
        for tap in range(kernel)
        if (phase + padding - dilation * tap) % stride == 0
    }
    first, last = min(shift for _, shift in reads), max(shift for _, shift in reads)
    taps = tuple(
        tuple(reads.get((phase, shift), kernel) for shift in range(first, last + 1))
        for phase in range(stride)
    )
    steps = -(-whole // stride)
    around = max(0, -first, steps + last - size)
    return _Phases(stride, kernel, taps, first, around, whole)


def _spread(graph: Graph, weight: Node, dim: int, phases: _Phases) -> Node:
    """``weight`` with dimension ``dim`` of its taps replaced by (phase, place in the window)."""
    order = [tap for row in phases.taps for tap in row]
    if order == list(range(phases.kernel)):
        return weight
    padding = [0, 0] * (3 - dim) + [0, 1]
    padded = emit(graph, aten.constant_pad_nd.default, (weight, padding))
    pieces = [emit(graph, aten.slice.Tensor, (padded, dim, tap, tap + 1)) for tap in order]
    return emit(graph, aten.cat.default, (pieces, dim))


def _weight(graph: Graph, call: Convolution, axes: tuple[_Phases, _Phases]) -> Node:
    """[C, O / groups, KH, KW] as [O · phases, C / groups, window, window], phases innermost in the first."""
    channels, outputs = shape_of(call.weight)[:2]
    (sh, wh), (sw, ww) = ((each.stride, each.window) for each in axes)
    weight = call.weight
    for axis, phases in enumerate(axes):
        weight = _spread(graph, weight, axis + 2, phases)
    inner = channels // call.groups
    split = emit(graph, aten.reshape.default, (weight, [call.groups, inner, outputs, sh, wh, sw, ww]))
    ordered = emit(graph, aten.permute.default, (split, [0, 2, 3, 5, 1, 4, 6]))
    shape = [call.groups * outputs * sh * sw, inner, wh, ww]
    return emit(graph, aten.reshape.default, (ordered, shape))


def _between(graph: Graph, value: Node, dim: int, start: int, end: int) -> Node:
    if start == 0 and end == shape_of(value)[dim]:
        return value
    return emit(graph, aten.slice.Tensor, (value, dim, start, end))


def _by_phase(graph: Graph, residual: Any, axes: tuple[_Phases, _Phases], sizes: tuple[int, int]) -> Any:
    """[B, O, OH, OW] as the plain convolution's [B, O · phases, *sizes]."""
    if residual is None:
        return None
    batch, outputs = shape_of(residual)[:2]
    sides = [
        (each.start * each.stride, (size - each.start) * each.stride - each.size)
        for each, size in zip(axes, sizes, strict=True)
    ]
    padded = emit(graph, aten.constant_pad_nd.default, (residual, [*sides[1], *sides[0]]))
    (sh, sw), (height, width) = (each.stride for each in axes), sizes
    split = emit(graph, aten.reshape.default, (padded, [batch, outputs, height, sh, width, sw]))
    ordered = emit(graph, aten.permute.default, (split, [0, 1, 3, 5, 2, 4]))
    return emit(graph, aten.reshape.default, (ordered, [batch, outputs * sh * sw, height, width]))


def _interleaved(node: Node) -> Node:
    """The transposed two-dimensional convolution as a plain one whose phases interleave."""
    call, graph = Convolution.of(node), node.graph
    axes = (_phases(call, 0), _phases(call, 1))
    batch, outputs = shape_of(node)[:2]
    (sh, sw), (height, width) = (each.stride for each in axes), (each.steps for each in axes)

    def repeated(vector: Any) -> Any:
        """A value a channel as one a channel and phase."""
        if vector is None or sh * sw == 1:
            return vector
        column = emit(graph, aten.unsqueeze.default, (vector, 1))
        wide = emit(graph, aten.expand.default, (column, [outputs, sh * sw]))
        return emit(graph, aten.reshape.default, (wide, [outputs * sh * sw]))

    with graph.inserting_before(node):
        sizes = (
            shape_of(call.x)[2] + 2 * axes[0].padding - axes[0].window + 1,
            shape_of(call.x)[3] + 2 * axes[1].padding - axes[1].window + 1,
        )
        plain = call._replace(
            weight=_weight(graph, call, axes), scale=repeated(call.scale), shift=repeated(call.shift),
            residual=_by_phase(graph, call.residual, axes, sizes), stride=[1, 1],
            padding=[each.padding for each in axes], dilation=[1, 1], transposed=False, output_padding=[0, 0],
        )  # fmt: skip
        value = emit(graph, CONVOLUTION, tuple(plain))
        for dim, each in enumerate(axes, 2):
            value = _between(graph, value, dim, each.start, each.start + each.steps)
        if sh * sw > 1:
            value = emit(graph, aten.reshape.default, (value, [batch, outputs, sh, sw, height, width]))
            value = emit(graph, aten.permute.default, (value, [0, 1, 4, 2, 5, 3]))
            value = emit(graph, aten.reshape.default, (value, [batch, outputs, height * sh, width * sw]))
        for dim, each in enumerate(axes, 2):
            value = _between(graph, value, dim, 0, each.size)
        return value


def run(module: GraphModule, settings: Settings) -> GraphModule:
    """After the epilogues are fused, because they are of the convolution that the model wrote."""
    for rewritten, applies in (
        (_lifted, lambda call: len(call.stride) == 1),
        (_interleaved, lambda call: call.transposed),
    ):
        for node in call_nodes(module.graph):
            if node.target is CONVOLUTION and applies(Convolution.of(node)):
                node.replace_all_uses_with(rewritten(node))
                module.graph.erase_node(node)
    return fresh_meta(module)

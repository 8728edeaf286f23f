"""A chain of three convolutions becomes ``mux::block``, one launch, where that is faster.

The chain is a 3 by 3 that only a 1 by 1 with a residual reads, and one of the 1 by 1 convolutions that read
their sum: the middle of a ResNet's bottleneck and the beginning of the next. Device and shape decide
(:mod:`choose_block`), never the bundle, and the bits are those of three launches.
"""

from __future__ import annotations

import math
import operator
from typing import Any

from torch.fx import GraphModule, Node

from torch_mux.settings import Settings

from ..graphs import call_nodes, emit, fake_of, fresh_meta, hoist, parameter_only, shape_of
from ..kernels import choose_block
from ..kernels.choose_block import BlockSize
from ..ops.block import BLOCK
from ..ops.semantic import CONVOLUTION, Convolution

__all__ = ["run"]


def _of_kernel(value: Any, taps: int) -> Convolution | None:
    """The arguments of a dense ``taps`` by ``taps`` convolution with ReLU that keeps the image's size."""
    if not isinstance(value, Node) or value.target is not CONVOLUTION:
        return None
    call = Convolution.of(value)
    if shape_of(call.weight)[2:] != (taps, taps) or call.transposed or call.groups != 1:
        return None
    once = call.stride == call.dilation == [1, 1] and call.padding == [taps // 2] * 2
    return call if once and call.activation == "relu" else None


def _alike(vectors: list[Any], weights: set[Node]) -> bool:
    """Whether one arena has them all."""
    return weights.issuperset(vectors) and len({fake_of(vector).dtype for vector in vectors}) == 1


def _chain(third: Node, weights: set[Node]) -> list[Convolution] | None:
    """The three convolutions that end in ``third``."""
    last = _of_kernel(third, 1)
    second = None if last is None else _of_kernel(last.x, 1)
    first = None if second is None else _of_kernel(second.x, 3)
    if first is None or second is None or last is None:
        return None
    if second.residual in (None, second.x) or first.residual is not None or last.residual is not None:
        return None
    chain, (batch, channels, *image) = [first, second, last], shape_of(first.x)
    wide, narrow = shape_of(second.weight)[0], shape_of(last.weight)[0]
    size = BlockSize(batch * math.prod(image), channels, wide, narrow)
    if len(second.x.users) != 1 or shape_of(first.weight)[0] != channels:
        return None
    if not choose_block.owned(size, fake_of(third).dtype):
        return None
    scales, shifts = [call.scale for call in chain], [call.shift for call in chain]
    scaled = _alike(scales, weights) or scales == [None] * 3
    return chain if scaled and _alike(shifts, weights) else None


def _fuse(chain: list[Convolution], third: Node, weights: set[Node]) -> None:
    graph, summed = third.graph, chain[2].x
    matrices, shifts = [call.weight for call in chain], [call.shift for call in chain]
    scales = [call.scale for call in chain if call.scale is not None]
    hoist(graph, [*matrices, *scales, *shifts], weights, summed)
    with graph.inserting_before(summed):
        fused = emit(graph, BLOCK, (chain[0].x, matrices, scales, shifts, chain[1].residual))
        results = [emit(graph, operator.getitem, (fused, index)) for index in range(2)]
    for node, result in zip((summed, third), results, strict=True):
        node.replace_all_uses_with(result)
    for node in (third, summed, chain[1].x):
        graph.erase_node(node)


def run(module: GraphModule, settings: Settings) -> GraphModule:
    """Chains in program order; weights are laid out before, and keep that."""
    weights = parameter_only(module.graph)
    for node in call_nodes(module.graph):
        if node.target is not CONVOLUTION or not choose_block.fused_on(fake_of(node).device):
            continue
        chain = _chain(node, weights)
        if chain is not None:
            _fuse(chain, node, weights)
    return fresh_meta(module)

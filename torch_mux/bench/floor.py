"""What a round or a layer cannot be faster than on a Hopper GPU, by its arithmetic and its memory traffic.

One dependent operation takes at least max(FLOPs / 800e12, bytes / bandwidth) seconds and a microsecond: what
the tensor cores and the memory of the device reach in practice, and the least from a node of a CUDA graph to
the next. A device without an entry in ``BANDWIDTHS`` has the floor of an H100; the record says whose it is.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from torch_mux.bench.layers import Layer
from torch_mux.bench.workloads import Tenants, TensorOnly
from torch_mux.lowering.flops import flops_of

__all__ = ["BANDWIDTHS", "FLOPS", "H100", "Floor", "layer_floor", "round_floor", "whose"]

FLOPS: Final = 800e12
LEVEL: Final = 1e-6
H100: Final = "NVIDIA H100 80GB HBM3"
#: Bytes a second that long copies move, by the device's name.
BANDWIDTHS: Final = {H100: 3.0e12, "NVIDIA H200": 4.3e12}


def whose(device: str) -> str:
    """The device whose floor this one's is taken to be; by name."""
    return device if device in BANDWIDTHS else H100


@dataclass(frozen=True)
class Floor:
    """Of a round of one request a tenant.

    Attributes:
        seconds: what it cannot be faster than.
        flops: of all tenants, in convolutions, matrix products and attention.
        nbytes: of all tenants' weights of those operations, each read once.
        levels: those operations that depend on each other, at most.
        device: whose it is.
    """

    seconds: float
    flops: int
    nbytes: int
    levels: int
    device: str

    def data(self) -> dict[str, Any]:
        """Plain data, in microseconds."""
        return {
            "floor_us": round(1e6 * self.seconds, 2),
            "flops": self.flops,
            "weight_bytes": self.nbytes,
            "levels": self.levels,
            "device": self.device,
        }


def round_floor(tenants: Tenants, count: int, device: str) -> Floor:
    """From the operations of one model, traced on no device: activations are taken to stay in the cache.

    Equal operations of all tenants go out together, independent ones of a model beside each other: so the
    levels count a microsecond each, and the rest adds up.

    Args:
        device: its name, as CUDA gives it.
    """
    bandwidth = BANDWIDTHS[whose(device)]
    graph = _trace(tenants)
    weights = {node.name for node in graph.graph.nodes if node.op == "get_attr"}
    holders: dict[Node, frozenset[str]] = {}  # which weights a node is only another view of
    depth: dict[Node, int] = {}
    work, flops, nbytes = 0.0, 0, 0
    for node in graph.graph.nodes:
        below = max((depth[source] for source in node.all_input_nodes), default=0)
        own = flops_of(node)
        depth[node] = below + (own > 0)
        if node.name in weights:
            holders[node] = frozenset((node.name,))
        elif not own and node.all_input_nodes and all(source in holders for source in node.all_input_nodes):
            holders[node] = frozenset().union(*(holders[source] for source in node.all_input_nodes))
        if own:
            read = sum(_nbytes(source) for source in node.all_input_nodes if source in holders)
            work += max(count * own / FLOPS, count * read / bandwidth)
            flops, nbytes = flops + count * own, nbytes + count * read
    levels = max(depth.values(), default=0)
    return Floor(work + levels * LEVEL, flops, nbytes, levels, whose(device))


def _trace(tenants: Tenants) -> torch.fx.GraphModule:
    """The first model's operations; its weights are attributes."""
    with torch.inference_mode(False), torch.no_grad():
        model: nn.Module = copy.deepcopy(tenants.models[0]).to("meta")
        inputs = [x.to("meta") for x in tenants.requests[0][0]]
        called = TensorOnly(model, tenants.workload.tensor).eval()
        for module in model.modules():
            # Fused forms of attention hide their products; with gradients torch does not take them.
            if isinstance(module, nn.MultiheadAttention):
                module.training = True
                module.dropout = 0.0
        return make_fx(called)(*inputs)


def _nbytes(node: Node) -> int:
    value = node.meta.get("val")
    return 0 if not isinstance(value, torch.Tensor) else value.numel() * value.element_size()


def layer_floor(layer: Layer, slots: int, device: str, size: int = 2) -> float:
    """Seconds of one layer for so many slots: weights, inputs, outputs and residuals go through memory once.

    Args:
        device: its name, as CUDA gives it.
        size: bytes of an element.
    """
    inputs = layer.m * layer.k
    if layer.conv is not None:
        channels, side = layer.conv[:2]
        inputs = channels * side * side
        if layer.conv[2] == 1 and layer.conv[3] > 1:  # a strided 1x1 reads the pixels that it keeps
            inputs = layer.m * layer.k
    elements = inputs + layer.n * layer.k + layer.m * layer.n * (2 if layer.residual else 1)
    flops, nbytes = 2.0 * slots * layer.m * layer.n * layer.k, slots * size * elements
    return max(flops / FLOPS, nbytes / BANDWIDTHS[whose(device)]) + LEVEL

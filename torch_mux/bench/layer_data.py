"""Operands of one layer for several instances, and the time of what is launched on them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_mux.bench.layers import Layer
from torch_mux.lowering.kernels import reference
from torch_mux.lowering.kernels.common import Launch
from torch_mux.lowering.kernels.conv import conv_launch, out_size
from torch_mux.lowering.kernels.data import BitClass, Tile, Vector
from torch_mux.lowering.kernels.depthwise import depthwise_launch
from torch_mux.lowering.kernels.linear import linear_launch

__all__ = ["HALF", "MOST_SETS", "MOST_SLOTS", "Data", "cold_sets", "timed"]

HALF: Final = torch.float16
#: More than the second level cache holds.
COLD_BYTES: Final = 160 << 20
MOST_SETS: Final = 48
MOST_SLOTS: Final = 16
UNCAPPED: Final = 1 << 20


def cold_sets(layer: Layer, slots: int, most: int) -> int:
    """Sets of weights to take in turn so that they come from memory, as far as ``most`` are enough."""
    return max(3, min(most, -(-COLD_BYTES // (slots * layer.n * layer.k * 2))))


class Data:
    """Inputs, weights and outputs of one layer: sets of slots to rotate through.

    Args:
        slots: instances, :data:`MOST_SLOTS` at most; slot t has the same operands whatever their number.
        sets: copies of all weights.
        device: the current GPU where it is None.
    """

    def __init__(
        self,
        layer: Layer,
        slots: int,
        sets: int,
        device: torch.device | None = None,
        dtype: torch.dtype = HALF,
    ) -> None:
        device = torch.device("cuda") if device is None else device
        generator = torch.Generator(device).manual_seed(0)
        self.layer, self.slots, self.sets = layer, slots, sets
        if layer.conv is None:
            shape: tuple[int, ...] = (slots, layer.m, layer.k)
            out: tuple[int, ...] = (slots, layer.m, layer.n)
        else:
            c, size, kernel, stride, padding = layer.conv
            side = out_size(size, kernel, stride, padding, 1)
            shape, out = (slots, 1, size, size, c), (slots, 1, side, side, layer.n)

        def draw(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, device=device)

        self.x = draw(MOST_SLOTS, *shape[1:]).to(dtype)[:slots].contiguous()
        first = (draw(MOST_SLOTS, layer.n, layer.k) / layer.k**0.5).to(dtype)[:slots]
        self.weights = torch.empty((sets * slots, layer.n, layer.k), dtype=dtype, device=device)
        self.weights.view(sets, slots, layer.n, layer.k)[:] = first
        self.arena = draw(MOST_SLOTS, layer.n)[:slots].repeat(sets, 1)
        whole_out = draw(MOST_SLOTS, *out[1:]).to(dtype)
        self.residual = whole_out[:slots].contiguous() if layer.residual else None
        self.xs = [self.x, *(self.x.clone() for _ in range(min(sets, 3) - 1))]
        self.outs = [torch.empty(out, dtype=dtype, device=device) for _ in self.xs]
        self.vendors = (
            self.weights if layer.conv is None else self.filters(self.weights).permute(0, 1, 4, 2, 3)
        )
        if layer.depthwise:  # which a vendor's kernel would copy first
            self.vendors = self.vendors.contiguous()
        base = self.weights.data_ptr()
        step = layer.n * layer.k * self.weights.itemsize
        self.table = torch.tensor([[base + step * row] for row in range(sets * slots)], device=device)
        self.rows = [torch.arange(slots, device=device) + slots * index for index in range(sets)]
        self.bias = self.arena[:slots].to(dtype)
        self.control = torch.tensor([slots, UNCAPPED], dtype=torch.int32, device=device)
        self.single = torch.tensor([1, UNCAPPED], dtype=torch.int32, device=device)

    def launch(
        self,
        index: int,
        bit_class: BitClass | None = None,
        tile: Tile | None = None,
        slot: int | None = None,
    ) -> Launch:
        """The launch of one set: of all slots, or of one by itself."""
        layer, turn = self.layer, index % len(self.xs)
        part = slice(None) if slot is None else slice(slot, slot + 1)
        x, out, rows = self.xs[turn][part], self.outs[turn][part], self.rows[index][part]
        control = self.control if slot is None else self.single
        named: dict[str, Any] = {
            "shift": Vector(self.arena, 0),
            "residual": None if self.residual is None else self.residual[part],
            "activation": layer.activation,
            "tile": tile,
        }
        if layer.conv is None:
            named |= {"n": layer.n, "k": layer.k, "bit_class": bit_class}
            return linear_launch(x, self.table, 0, rows, control, out, **named)
        _, _, kernel, stride, padding = layer.conv
        named |= {"kernel": (kernel,) * 2, "stride": (stride,) * 2, "padding": (padding,) * 2}
        if layer.depthwise:
            return depthwise_launch(x, self.table, 0, rows, control, out, **named)
        return conv_launch(x, self.table, 0, rows, control, out, bit_class=bit_class, **named)

    def filters(self, weights: Tensor) -> Tensor:
        """[..., O, KH, KW, C / groups] of weights [..., n, k] as the kernels read them."""
        assert self.layer.conv is not None
        channels, kernel = self.layer.conv[0], self.layer.conv[2]
        if self.layer.depthwise:
            return weights.reshape(*weights.shape[:-2], kernel, kernel, self.layer.n, 1).movedim(-2, -4)
        return weights.reshape(*weights.shape[:-1], kernel, kernel, channels)

    def vendor(self, index: int, slot: int) -> Tensor:
        """One slot of a set through cuBLAS or cuDNN, or their like on a CPU, with its bias, but neither
        activation nor residual; of a convolution [1, O, H, W]."""
        layer, turn = self.layer, index % len(self.xs)
        weight, bias = self.vendors[index * self.slots + slot], self.bias[slot]
        if layer.conv is None:
            return F.linear(self.xs[turn][slot], weight, bias)
        _, _, _, stride, padding = layer.conv
        image = self.xs[turn][slot].permute(0, 3, 1, 2)
        return F.conv2d(image, weight, bias, stride, padding, groups=self.groups)

    @property
    def groups(self) -> int:
        """Of the convolution."""
        return self.layer.n if self.layer.depthwise else 1

    def exact(self, slots: int, plain: bool = False) -> Tensor:
        """float64 results of the first slots, in the layout of the outputs.

        Args:
            plain: without activation and residual.
        """
        layer = self.layer
        residual = None if plain or self.residual is None else list(self.residual[:slots])
        named: dict[str, Any] = {"shifts": list(self.arena[:slots]), "residuals": residual}
        named["activation"] = "none" if plain else layer.activation
        weights, xs = self.weights[:slots], list(self.x[:slots])
        if layer.conv is None:
            return torch.stack(reference.linear(xs, list(weights), **named))
        _, _, _, stride, padding = layer.conv
        named |= {"stride": (stride, stride), "padding": (padding, padding), "groups": self.groups}
        return torch.stack(reference.conv(xs, list(self.filters(weights)), **named))


def timed(body: Callable[[int], object], sets: int, repetitions: int = 7) -> float:
    """Microseconds of one call: the median over replays of a graph that calls ``body`` for every set."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for index in range(min(sets, 2)):
            body(index)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(sets):
            body(index)
    graph.replay()
    found = []
    for _ in range(repetitions):
        start, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(float(start.elapsed_time(end)) * 1e3 / sets)
    return statistics.median(found)

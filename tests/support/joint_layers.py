"""Linear layers of several programs, each as a launch of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_mux.lowering.kernels.common import Launch
from torch_mux.lowering.kernels.conv import conv_launch
from torch_mux.lowering.kernels.data import Part, Vector
from torch_mux.lowering.kernels.linear import linear_launch

__all__ = ["BERT", "GROUPS", "VIT", "Layer", "convolutions_of", "launches_of"]


@dataclass(frozen=True)
class Layer:
    """One program's layer: slots, active slots, rows, outputs (of each part), reduction."""

    slots: int
    active: int
    m: int
    widths: tuple[int, ...]
    k: int


def launches_of(
    tools: Any, layers: Sequence[Layer], dtype: torch.dtype, kept: list[Any], **options: Any
) -> tuple[list[Launch], list[Tensor]]:
    """A launch a layer and its outputs, filled with 7; the same operands each time."""
    torch.manual_seed(0)
    launches, outs = [], []
    for layer in layers:
        n = sum(layer.widths)
        x = tools.guarded(torch.randn(layer.slots, layer.m, layer.k).to(dtype))
        weights = [
            [tools.guarded((torch.randn(w, layer.k) / layer.k**0.5).to(dtype)) for w in layer.widths]
            for _ in range(layer.slots)
        ]
        table = torch.tensor([[weight.data_ptr() for weight in own] for own in weights], device=tools.device)
        arena = torch.randn(layer.slots, n + 3, device=tools.device)
        residual = torch.randn(layer.slots, layer.m, n).to(tools.device, dtype)
        out = torch.full((layer.slots, layer.m, n), 7.0, dtype=dtype, device=tools.device)
        rows = torch.arange(layer.slots, device=tools.device).flip(0)
        named: dict[str, Any] = {
            "activation": options.get("activation", "gelu"),
            "sms": options.get("sms", 2),
        }
        if options.get("residual"):
            named["residual"] = residual
        if "tile" in options:
            named["tile"] = options["tile"]
        lefts = [sum(layer.widths[:index]) for index in range(len(layer.widths))]
        if len(layer.widths) > 1:
            named["parts"] = [
                Part(column, w, layer.k, 3 + left, 3 + left)
                for column, (w, left) in enumerate(zip(layer.widths, lefts))
            ]
        for key in options.get("vectors", ("shift",)):
            named[key] = Vector(arena, 3)
        control = tools.control(layer.active, options.get("cap", 132))
        launches.append(linear_launch(x, table, 0, rows, control, out, n=n, k=layer.k, **named))
        outs.append(out)
        kept.append((weights, x, residual))
    return launches, outs


VIT, BERT = Layer(2, 2, 37, (48,), 64), Layer(3, 2, 24, (48,), 32)
GROUPS = {
    "two": [VIT, BERT],
    "three": [BERT, VIT, Layer(1, 1, 21, (40,), 24)],
    "four": [VIT, BERT, Layer(1, 1, 25, (33,), 17), Layer(2, 1, 18, (16,), 128)],
    "one has nothing to do": [VIT, Layer(2, 0, 24, (48,), 32), BERT],
    "parts beside a single weight": [Layer(2, 2, 20, (16, 16, 16), 32), Layer(2, 1, 30, (48,), 32)],
    "two and three parts": [Layer(1, 1, 20, (32, 8), 32), Layer(2, 2, 19, (16, 24, 8), 48)],
}


def convolutions_of(
    tools: Any,
    layers: Sequence[tuple[int, int, int, int]],
    dtype: torch.dtype,
    kept: list[Any],
    **options: Any,
) -> tuple[list[Launch], list[Tensor]]:
    """A launch for each (slots, active, size, channels out), and its outputs, filled with 7."""
    torch.manual_seed(0)
    c, kernel = options.get("channels", 8), options.get("kernel", (3, 3))
    geometry = {
        "kernel": kernel,
        "stride": options.get("stride", (1, 1)),
        "padding": options.get("padding", (1, 1)),
        "dilation": options.get("dilation", (1, 1)),
    }
    launches, outs = [], []
    for slots, active, size, o in layers:
        x = tools.guarded(torch.randn(slots, 1, size, size, c).to(dtype))
        reach = (kernel[0] * kernel[1] * c) ** 0.5
        weights = [tools.guarded((torch.randn(o, *kernel, c) / reach).to(dtype)) for _ in range(slots)]
        table = torch.tensor([[weight.data_ptr()] for weight in weights], device=tools.device)
        arena = torch.randn(slots, 2 * o + 1, device=tools.device)
        sides = zip(*(geometry[key] for key in ("kernel", "stride", "padding", "dilation")))
        oh, ow = ((size + 2 * p - d * (k - 1) - 1) // s + 1 for k, s, p, d in sides)
        out = torch.full((slots, 1, oh, ow, o), 7.0, dtype=dtype, device=tools.device)
        residual = torch.randn(out.shape).to(tools.device, dtype)
        named: dict[str, Any] = {**geometry, "activation": options.get("activation", "relu")}
        named["sms"] = options.get("sms", 2)
        named |= {key: Vector(arena, 1) for key in options.get("vectors", ("scale", "shift"))}
        if options.get("residual"):
            named["residual"] = residual
        if "tile" in options:
            named["tile"] = options["tile"]
        rows, control = torch.arange(slots, device=tools.device).flip(0), tools.control(active, 132)
        launches.append(conv_launch(x, table, 0, rows, control, out, **named))
        outs.append(out)
        kept.append((weights, x, residual))
    return launches, outs

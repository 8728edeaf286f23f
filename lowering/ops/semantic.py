"""``mux::linear``, ``mux::linears``, ``mux::convolution``: one slot's GEMM or convolution with its epilogue.

They are what passes write into a graph in place of ATen's operations. Run as they stand they are the plain
PyTorch meaning of a super-kernel; the slot axis turns them into ``lowering.ops.slots``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

__all__ = [
    "ACTIVATIONS",
    "CONVOLUTION",
    "LIBRARY",
    "LINEAR",
    "LINEARS",
    "Convolution",
    "apply_activation",
    "apply_epilogue",
    "is_depthwise",
]

LIBRARY: Final = torch.library.Library("mux", "DEF")

#: Activations an epilogue can apply, by name.
ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "relu6": lambda x: torch.clamp(x, 0, 6),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def apply_activation(x: Tensor, name: str) -> Tensor:
    """``x`` through the named activation of :data:`ACTIVATIONS`."""
    return ACTIVATIONS[name](x)


def apply_epilogue(
    accumulator: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    activation: str,
    channel: int,
) -> Tensor:
    """``act(accumulator * scale + shift + residual)``; the vectors lie along dimension ``channel``.

    Computed in the accumulator's dtype, which is float32 or wider for half-precision operands.
    """
    view = [1] * accumulator.dim()
    view[channel] = -1
    if scale is not None:
        accumulator = accumulator * scale.to(accumulator.dtype).view(view)
    if shift is not None:
        accumulator = accumulator + shift.to(accumulator.dtype).view(view)
    if residual is not None:
        accumulator = accumulator + residual
    return apply_activation(accumulator, activation)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """``act((x @ weight.T) * scale + shift + residual)``.

    Args:
        x: [..., K].
        weight: [N, K], any strides, dtype of ``x``.
        scale, shift: [N] of any float dtype, or None.
        residual: the result's shape, or None.
        activation: a name in :data:`ACTIVATIONS`.

    Returns:
        [..., N] in the dtype of ``x``, contiguous.
    """
    wide = F.linear(_wide(x), _wide(weight))
    return apply_epilogue(wide, scale, shift, residual, activation, -1).to(x.dtype).contiguous()


def linears(x: Tensor, weights: Sequence[Tensor], shifts: Sequence[Tensor], activation: str) -> list[Tensor]:
    """``linear`` of one input by several weights.

    Args:
        x: [..., K].
        weights: each [N, K] with an N of its own.
        shifts: one a weight, or none at all.

    Returns:
        [..., N] for each weight.
    """
    terms: Sequence[Tensor | None] = shifts or [None] * len(weights)
    pairs = zip(weights, terms, strict=True)
    return [linear(x, weight, None, shift, None, activation) for weight, shift in pairs]


class Convolution(NamedTuple):
    """The arguments of a ``mux::convolution`` call, as :func:`convolution` takes them."""

    x: Any
    weight: Any
    scale: Any
    shift: Any
    residual: Any
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int
    activation: str

    @classmethod
    def of(cls, node: Node) -> Convolution:
        """The arguments of ``node``."""
        args: Any = node.args
        return cls(*args)


def convolution(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    activation: str,
) -> Tensor:
    """``act(aten.convolution(x, weight) * scale + shift + residual)``, over one or two spatial dimensions.

    Args:
        x: [B, C, H, W] or [B, C, L].
        weight: [O, C / groups, KH, KW] or without KH; transposed: [C, O / groups, KH, KW].
        scale, shift: [O] of any float dtype, or None.
        residual: the result's shape, or None.
        stride, padding, dilation, output_padding: one number a spatial dimension.

    Returns:
        [B, O, OH, OW] or [B, O, OL] in the dtype of ``x``, channels-last in memory.
    """
    geometry = (list(stride), list(padding), list(dilation), transposed, list(output_padding), groups)
    wide = torch.convolution(_wide(x), _wide(weight), None, *geometry)
    result = apply_epilogue(wide, scale, shift, residual, activation, 1).to(x.dtype)
    return result.movedim(1, -1).contiguous().movedim(-1, 1)


LIBRARY.define(
    "linear(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, Tensor? residual, "
    "str activation) -> Tensor"
)
LIBRARY.define(
    "convolution(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, Tensor? residual, "
    "int[] stride, int[] padding, int[] dilation, bool transposed, int[] output_padding, int groups, "
    "str activation) -> Tensor"
)
LIBRARY.define("linears(Tensor x, Tensor[] weights, Tensor[] shifts, str activation) -> Tensor[]")
LIBRARY.impl("linears", linears, "CompositeExplicitAutograd")
LIBRARY.impl("linear", linear, "CompositeExplicitAutograd")
LIBRARY.impl("convolution", convolution, "CompositeExplicitAutograd")


def _linear_fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linears_fake(
    x: Tensor, weights: Sequence[Tensor], shifts: Sequence[Tensor], activation: str
) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]


def _convolution_fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    activation: str,
) -> Tensor:
    spatial = []
    for axis, size in enumerate(x.shape[2:]):
        reach = dilation[axis] * (weight.shape[axis + 2] - 1) + 1
        if transposed:
            whole = (size - 1) * stride[axis] - 2 * padding[axis] + reach + output_padding[axis]
        else:
            whole = (size + 2 * padding[axis] - reach) // stride[axis] + 1
        spatial.append(whole)
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    return x.new_empty((x.shape[0], *spatial, channels)).movedim(-1, 1)


torch.library.register_fake("mux::linear", _linear_fake, lib=LIBRARY)
torch.library.register_fake("mux::linears", _linears_fake, lib=LIBRARY)
torch.library.register_fake("mux::convolution", _convolution_fake, lib=LIBRARY)

LINEAR: Final = torch.ops.mux.linear.default
LINEARS: Final = torch.ops.mux.linears.default
CONVOLUTION: Final = torch.ops.mux.convolution.default


def is_depthwise(node: Node) -> bool:
    """Whether ``node``, a call of ``mux::convolution``, has every input channel for itself."""
    call = Convolution.of(node)
    return not call.transposed and call.groups > 1 and call.weight.meta["val"].shape[1] == 1

"""Plain PyTorch of every super-kernel: one slot after another, the oracle of the tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_mux.lowering.kernels.data import Activation

__all__ = ["activate", "attention", "conv", "embedding", "linear"]

Optional = Sequence[Tensor] | None

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.NONE: lambda x: x,
    Activation.RELU: F.relu,
    Activation.RELU6: F.relu6,
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    Activation.SILU: F.silu,
    Activation.HARDSWISH: F.hardswish,
    Activation.SIGMOID: torch.sigmoid,
    Activation.TANH: torch.tanh,
}


def activate(x: Tensor, activation: Activation | str) -> Tensor:
    """The activation that ``activation`` names."""
    return _ACTIVATIONS[Activation(activation)](x)


def _finish(
    value: Tensor,
    slot: int,
    scales: Optional,
    shifts: Optional,
    residuals: Optional,
    activation: Activation | str,
) -> Tensor:
    if scales is not None:
        value = value * scales[slot].to(value.dtype)
    if shifts is not None:
        value = value + shifts[slot].to(value.dtype)
    if residuals is not None:
        value = value + residuals[slot].to(value.dtype)
    return activate(value, activation)


def linear(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    scales: Optional = None,
    shifts: Optional = None,
    residuals: Optional = None,
    activation: Activation | str = Activation.NONE,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """``activation((x @ W.T) * scale + shift + residual)`` a slot, computed and returned in ``dtype``.

    Args:
        xs: slot t's [..., K_t]; sizes may differ from slot to slot.
        weights: slot t's [N_t, K_t].
        scales, shifts: slot t's [N_t].
        residuals: slot t's [..., N_t].
    """
    return [
        _finish(x.to(dtype) @ weight.to(dtype).T, slot, scales, shifts, residuals, activation)
        for slot, (x, weight) in enumerate(zip(xs, weights, strict=True))
    ]


def conv(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    scales: Optional = None,
    shifts: Optional = None,
    residuals: Optional = None,
    activation: Activation | str = Activation.NONE,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """``activation(conv2d(x, W) * scale + shift + residual)`` a slot, computed and returned in ``dtype``.

    Args:
        xs: slot t's [N, H, W, C]; sizes may differ from slot to slot.
        weights: slot t's [O, KH, KW, C / groups].
        scales, shifts: slot t's [O].
        residuals: slot t's [N, OH, OW, O].
    """
    found = []
    for slot, (x, weight) in enumerate(zip(xs, weights, strict=True)):
        image, kernel = x.to(dtype).permute(0, 3, 1, 2), weight.to(dtype).permute(0, 3, 1, 2)
        value = F.conv2d(image, kernel, None, stride, padding, dilation, groups)
        found.append(_finish(value.permute(0, 2, 3, 1), slot, scales, shifts, residuals, activation))
    return found


def embedding(indices: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """``W[indices]`` a slot."""
    return [F.embedding(index, weight) for index, weight in zip(indices, weights, strict=True)]


def attention(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    masks: Optional = None,
    is_causal: bool = False,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """``softmax(q @ k.T * scale + mask) @ v`` a slot, computed in ``dtype``: [B, M, H, DV].

    Args:
        queries: slot t's [B, H, M, D].
        keys, values: slot t's [B, G, N, D] and [B, G, N, DV]; H is a multiple of G.
        masks: slot t's, added; broadcasts to [B, H, M, N]. A row that it excludes altogether gives 0.
        is_causal: query i sees keys 0 … i only.
        scale: D ** -0.5 by default.
    """
    found = []
    for slot, (query, key, value) in enumerate(zip(queries, keys, values, strict=True)):
        shared = query.shape[1] // key.shape[1]
        key, value = (each.to(dtype).repeat_interleave(shared, 1) for each in (key, value))
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        scores = query.to(dtype) @ key.mT * factor
        if masks is not None:
            scores = scores + masks[slot].to(dtype)
        if is_causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(hidden, float("-inf"))
        weights = torch.softmax(scores, -1).nan_to_num(0.0)
        found.append((weights @ value).transpose(1, 2))
    return found

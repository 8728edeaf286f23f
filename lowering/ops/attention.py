"""``mux::attention`` of one slot and ``mux::slot_attention`` of a bundle: scaled dot-product attention.

On CUDA the bundle is one super-kernel launch. On the CPU it is one vendor call a slot: which thread gets a
head, by the batch, decides last bits there.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from . import turns
from .semantic import LIBRARY
from .vendor import aligned

__all__ = ["ATTENTION", "SLOT_ATTENTION"]

LIBRARY.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool is_causal, float? scale) -> Tensor"
)
LIBRARY.define(
    "slot_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor control, bool is_causal, "
    "float? scale, bool allow_tf32) -> Tensor"
)


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    """``softmax(query @ key.T * scale + mask) @ value``.

    Args:
        query: [B, H, M, D].
        key, value: [B, G, N, D] and [B, G, N, DV]; H / G neighbouring heads share keys.
        mask: added; broadcasts to [B, H, M, N]. Or None.
        scale: D ** -0.5 by default.

    Returns:
        [B, H, M, DV], in memory [B, M, H, DV].
    """
    shared = key.shape[1] != query.shape[1]
    out = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=shared
    )
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
    """One slot's or a bundle's result, heads inside positions in memory."""
    *outer, heads, queries, _ = query.shape
    return query.new_empty((*outer, queries, heads, value.shape[-1])).transpose(-2, -3)


def _slots_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    control: Tensor,
    is_causal: bool,
    scale: float | None,
    allow_tf32: bool,
) -> Tensor:
    """[T, B, H, N, E] each."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, whole = _fake(query, key, value), mask
    if mask is not None:
        whole = mask.expand(query.shape[0], *mask.shape[1:3], query.shape[-2], -1)
    for slot in range(query.shape[0]):
        operands = [aligned(each[slot]) for each in (query, key, value)]
        own = None if whole is None else aligned(whole[slot])
        out[slot].copy_(attend(*operands, 0.0, is_causal, attn_mask=own, scale=scale)[0])
    return out


def _slots_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    control: Tensor,
    is_causal: bool,
    scale: float | None,
    allow_tf32: bool,
) -> Tensor:
    from ..kernels.attention import attention as launch

    out = _fake(query, key, value)
    launch(
        query,
        key,
        value,
        control,
        out.transpose(-2, -3),
        mask=mask,
        is_causal=is_causal,
        scale=scale,
        allow_tf32=allow_tf32,
    )
    return out


LIBRARY.impl("attention", attention, "CompositeExplicitAutograd")
LIBRARY.impl("slot_attention", turns.taking_turns(_slots_cpu, turns.attention), "CPU")
LIBRARY.impl("slot_attention", _slots_cuda, "CUDA")
torch.library.register_fake("mux::attention", _fake, lib=LIBRARY)
torch.library.register_fake("mux::slot_attention", _fake, lib=LIBRARY)

ATTENTION: Final = torch.ops.mux.attention.default
SLOT_ATTENTION: Final = torch.ops.mux.slot_attention.default

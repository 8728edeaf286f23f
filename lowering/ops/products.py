"""``mux::slot_bmm``: products of activations on the CPU, one vendor call a slot.

There a batch of one is multiplied by other code than a batch of several, so folding slots into it would
change bits.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from .semantic import LIBRARY
from .vendor import aligned

__all__ = ["SLOT_BMM"]

LIBRARY.define("slot_bmm(Tensor left, Tensor right) -> Tensor")


def _bmm(left: Tensor, right: Tensor) -> Tensor:
    """[T, B, M, K] times [T, B, K, N]."""
    slots = zip(left.unbind(0), right.unbind(0), strict=True)
    return torch.stack([torch.bmm(aligned(one), aligned(other)) for one, other in slots])


def _bmm_fake(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty((*left.shape[:-1], right.shape[-1]))


LIBRARY.impl("slot_bmm", _bmm, "CPU")
torch.library.register_fake("mux::slot_bmm", _bmm_fake, lib=LIBRARY)

SLOT_BMM: Final = torch.ops.mux.slot_bmm.default

"""What a super-kernel launch computes, as plain data: what its cost and its matches are decided by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_mux.lowering.kernels.data import Activation, BitClass

__all__ = ["Operation", "attention_operation", "conv_form", "copy_operation", "linear_operation"]


@dataclass(frozen=True)
class Operation:
    """One launch without its operands.

    Attributes:
        kind: "linear", "conv", "block", "depthwise", "attention", "embedding", "gather" or "scatter".
        sizes: (m, n, k) of every slot, of all parts of it; of a copy (elements, 1, 1); of attention (queries,
            keys, channels) of every head; of a block (pixels, channels of its sum, channels of its last).
        dtype: of the operands.
        bit_class: what the result's bits depend on besides; None where no choice changes them.
        channels: input channels of every slot of a convolution or block; of attention those of its values,
            once.
        taps: of the kernel of a convolution, (along H, along W).
        form: launches of one form and bit class can be one launch; None: it matches nothing.
        activation: what is applied last, for people to read.
    """

    kind: str
    sizes: tuple[tuple[int, int, int], ...]
    dtype: torch.dtype
    bit_class: BitClass | None = None
    channels: tuple[int, ...] = ()
    taps: tuple[int, int] = (1, 1)
    form: Hashable = None
    activation: str = "none"

    def matches(self, other: Operation) -> bool:
        """Whether one launch can do both with the bits of each."""
        return (
            self.form is not None
            and (self.form, self.bit_class) == (other.form, other.bit_class)
            and self.dtype == other.dtype
        )

    def __str__(self) -> str:
        if self.kind in ("gather", "scatter"):
            return f"{self.kind} {len(self.sizes)}x{self.sizes[0][0]}"
        counts = Counter(self.sizes)
        sizes = " + ".join(f"{count}x({m}x{n}x{k})" for (m, n, k), count in counts.items())
        taps = f" {self.taps[0]}x{self.taps[1]}" if self.kind in ("conv", "block", "depthwise") else ""
        tail = "" if self.activation == "none" else f" {self.activation}"
        return f"{self.kind}{taps} {sizes}{tail}"


def linear_operation(
    sizes: Sequence[tuple[int, int, int]],
    dtype: torch.dtype,
    bit_class: BitClass,
    *,
    k_major: bool,
    scale: torch.dtype | None,
    shift: torch.dtype | None,
    residual: bool,
    activation: Activation | str,
    parts: int = 1,
    aligned: bool = True,
    ragged: bool = False,
) -> Operation:
    """A linear layer; those with equal rows of weights, alignment and epilogue are of one form.

    Args:
        sizes: (m, n, k) of every part of every slot.
        k_major: the weight's rows are dense along the reduction.
        scale, shift: dtypes of the vectors, or None where there is none.
        parts: weights of a slot; up to four are as good as one.
        ragged: slots differ in size, and match nothing.
    """
    name = Activation(activation).value
    form = ("linear", k_major, aligned, scale, shift, residual, name, max(4, parts))
    return Operation("linear", tuple(sizes), dtype, bit_class, form=None if ragged else form, activation=name)


def conv_form(
    geometry: tuple[Sequence[int], ...],
    channels: Sequence[int],
    groups: int,
    scale: torch.dtype | None,
    shift: torch.dtype | None,
    residual: Tensor | None,
    activation: str,
    aligned: bool = True,
    ragged: bool = False,
) -> Hashable:
    """The form of a convolution: kernel, steps and channels in are what its code is compiled for.

    Args:
        geometry: kernel, stride, padding and dilation.
        channels: input channels of every slot.
        ragged: slots differ in size, and match nothing.
    """
    if ragged or groups > 1 or len(set(channels)) != 1:
        return None
    steps = tuple(map(tuple, geometry))
    return ("conv", steps, channels[0], scale, shift, residual is not None, activation, aligned)


def attention_operation(query: Tensor, key: Tensor, value: Tensor, bit_class: BitClass) -> Operation:
    """Attention of all slots: [T, B, H, N, E] each."""
    slots, images, heads, queries, channels = query.shape
    sizes = ((queries, key.shape[-2], channels),) * (slots * images * heads)
    return Operation("attention", sizes, query.dtype, bit_class, (value.shape[-1],))


def copy_operation(batched: Tensor, to_batch: bool) -> Operation:
    """A gather or scatter of the slots of ``batched``."""
    slots = batched.shape[0]
    size = (batched[0].numel() if slots else 0, 1, 1)
    return Operation("gather" if to_batch else "scatter", (size,) * slots, batched.dtype)

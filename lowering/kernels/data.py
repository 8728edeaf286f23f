"""Plain data of the super-kernels; imports no Triton, so it can be read where there is none."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

__all__ = [
    "Activation",
    "BitClass",
    "Family",
    "Part",
    "Problems",
    "Tile",
    "Vector",
    "family_of",
    "precision_of",
]


class Activation(str, Enum):
    """What a super-kernel applies last. The values are what the kernels are specialised on."""

    NONE = "none"
    RELU = "relu"
    RELU6 = "relu6"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    SILU = "silu"
    HARDSWISH = "hardswish"
    SIGMOID = "sigmoid"
    TANH = "tanh"


class Family(str, Enum):
    """The instructions that multiply: asynchronous tensor cores, or tensor cores of a warp."""

    WGMMA = "wgmma"
    MMA = "mma"


@dataclass(frozen=True)
class BitClass:
    """What decides the bits of a result; a function of the operation's shape and dtype only.

    Attributes:
        family: the multiplying instructions; None in half precision, where all give the same bits.
        swap: weights on the M side of the instruction and pixels on the N side, whatever the tile.
        gather: the K axis of a convolution is flattened over taps and channels instead of tap by tap.
        precision: see :func:`precision_of`.
        step: elements of the reduction that are summed before the sum is rounded, 0 where any number gives
            the same bits.
    """

    family: Family | None
    swap: bool = False
    gather: bool = False
    precision: str = "ieee"
    step: int = 0


@dataclass(frozen=True)
class Tile:
    """How one launch is cut up; free to change within a bit class.

    Attributes:
        block_m: rows (tokens, output pixels) of a tile.
        block_n: output channels of a tile, a power of two.
        block_k: elements of the reduction a step, a multiple of 16.
        warps: warps of a program.
        stages: buffers of the software pipeline.
        programs_per_sm: programs that one multiprocessor holds; a cap of c SMs admits c times as many.
        second_n: so many output channels more, another power of two: 64 and 32 make a tile 96 wide. Linear
            layers only.
        swap: weights on the M side of the instruction and rows on the N side, where a few are no waste.
            Linear layers of half precision only: there either way gives the same bits.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    programs_per_sm: int
    second_n: int = 0
    swap: bool = False

    @property
    def width(self) -> int:
        """All output channels of a tile."""
        return self.block_n + self.second_n

    @property
    def registers(self) -> int | None:
        """Most a thread may have for the programs to fit; None for four warps, of which all tiles fit."""
        if self.warps <= 4 or self.programs_per_sm == 1:
            return None
        return 65536 // (32 * self.warps * self.programs_per_sm)


def precision_of(dtype: torch.dtype, allow_tf32: bool) -> str:
    """How Triton is to multiply operands of ``dtype``.

    True fp32 is ``"tf32x3"``: an operand is split into two TF32 numbers, three products make up for the
    rounding of one, and every step's sum is added in fp32, since tensor cores truncate. The error is that of
    fp32 arithmetic (Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores while
    surpassing the FP32 theoretical peak performance", 2022); plain FMA took 4 to 7 times as long.
    """
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if allow_tf32 else "tf32x3"


def family_of(tile: Tile, swap: bool) -> Family:
    """The instructions that Triton picks on compute capability 9 for ``tile`` of a class with ``swap``."""
    across = swap or tile.swap
    tall, wide = (tile.block_n, tile.block_m) if across else (tile.block_m, tile.block_n)
    if tall % 64 == 0 and wide % 8 == 0 and tile.warps % 4 == 0:
        return Family.WGMMA
    return Family.MMA


@dataclass(frozen=True)
class Vector:
    """A vector of one value an output channel for every slot.

    Slot t's lives at ``arena[rows[t], offset:offset + n]``.

    Attributes:
        arena: [capacity, width], any float dtype, rows contiguous.
        offset: its first column.
    """

    arena: Tensor
    offset: int


@dataclass(frozen=True)
class Problems:
    """A ragged problem list: what each slot's operation measures and where its data lies.

    Attributes:
        records: int64 [slots, fields] on the device; may be rewritten in place between launches by
            records of the same bit class whose ``divisors`` still divide them.
        sizes: the (m, n, k) of every slot on the host, what grid and tile are chosen by.
        divisors: a power of two up to 16 for each of reduction, channels, data offsets that divides it.
    """

    records: Tensor
    sizes: tuple[tuple[int, int, int], ...]
    divisors: tuple[int, int, int]


@dataclass(frozen=True)
class Part:
    """One of several weights of a slot that share an input; their outputs lie side by side.

    Attributes:
        column: of the pointer table.
        n: output channels.
        stride: the weight's leading stride in elements.
        scale_offset, shift_offset: first columns of its vectors in their arenas.
    """

    column: int
    n: int
    stride: int
    scale_offset: int = 0
    shift_offset: int = 0

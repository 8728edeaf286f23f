# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,unused-ignore"
"""What the super-kernels share: the persistent loop's bookkeeping, the epilogue and the launch record."""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_mux import compat
from torch_mux.lowering.kernels.code import Code
from torch_mux.lowering.kernels.data import Activation, BitClass, Family, Problems, Tile, Vector
from torch_mux.lowering.kernels.interception import Turn, handed
from torch_mux.lowering.kernels.operation import Operation

__all__ = [
    "Activation",
    "BitClass",
    "Family",
    "Launch",
    "Problems",
    "Tile",
    "Vector",
    "activate",
    "dependent",
    "divisor",
    "epilogue",
    "find_slot",
    "multiprocessors",
    "settled",
    "tile_ends",
    "tile_origin",
    "vector_arguments",
    "weight_pointer",
    "working_set",
]

SUPPORTED = (torch.float16, torch.bfloat16, torch.float32)

compat.keep_launchers_apart()


@triton.jit
def tanh(x):
    """Hyperbolic tangent in fp32; the series keeps small arguments accurate to their last bits."""
    square = x * x
    series = 0.021869489 * square - 0.053968254
    series = series * square + 0.13333333
    series = series * square - 0.33333333
    series = x + x * square * series
    return tl.where(tl.abs(x) < 0.25, series, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def gelu(x):
    """``x * Phi(x)`` in fp32 as ``max(x, 0) - |x| * Phi(-|x|)``, so that nothing cancels in the left tail.

    ``Phi(-|x|)`` is ``exp(-x * x / 2)`` by a polynomial in ``1 / (1 + p * |x|)`` (the form of Abramowitz and
    Stegun 7.1.26, fitted anew for the error of ``|x| * Phi(-|x|)``, 3e-9): 16 instructions, erf took 32. The
    reciprocal is a squared inverse root because a division is nine. Beyond 16 the tail is 0.
    """
    size = tl.minimum(tl.abs(x), 16.0)
    root = tl.rsqrt(0.281 * size + 1.0)
    t = root * root
    tail = -0.106325954 * t + 0.38743174
    tail = tail * t - 0.23471847
    tail = tail * t + 0.269264
    tail = tail * t + 0.06724322
    tail = tail * t + 0.11710531
    tail = (tail * t) * tl.exp2(-0.7213475204444817 * size * size)
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - size * tail


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Applies the activation named ``ACTIVATION`` (a value of :class:`Activation`) to an fp32 block."""
    if ACTIVATION == "relu":
        x = tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "relu6":
        x = tl.where(x < 0.0, 0.0, tl.where(x > 6.0, 6.0, x))
    elif ACTIVATION == "gelu":
        x = gelu(x)
    elif ACTIVATION == "gelu_tanh":
        x = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "hardswish":
        gate = x + 3.0
        gate = tl.where(gate < 0.0, 0.0, tl.where(gate > 6.0, 6.0, gate))
        x = x * gate * 0.16666666666666666
    elif ACTIVATION == "sigmoid":
        x = 1.0 / (1.0 + tl.exp(-x))
    elif ACTIVATION == "tanh":
        x = tanh(x)
    return x


@triton.jit
def plus(acc, term):
    """``acc + term``, written so that Triton does not start a dot product's sum at ``term`` instead of zero.

    It would where the reduction is one step and no loop is left, so that bits would depend on the tile.
    """
    return tl.math.fma(acc, tl.full(acc.shape, 1.0, tl.float32), tl.broadcast_to(term, acc.shape))


@triton.jit
def finish(acc, scale, shift, residual, out, row, column, m, n, pitch, ACTIVATION: tl.constexpr):
    """Stores ``activate(acc * scale + shift + residual)`` for the channels ``column``."""
    inside = column < n
    if scale is not None:
        factor = tl.load(scale + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        if shift is not None:
            term = tl.load(shift + column, mask=inside, other=0.0).to(tl.float32)[None, :]
            acc = tl.math.fma(acc, factor, term)
        else:
            acc = acc * factor
    elif shift is not None:
        acc = plus(acc, tl.load(shift + column, mask=inside, other=0.0).to(tl.float32)[None, :])
    offsets = row[:, None] * pitch + column[None, :]
    mask = (row < m)[:, None] & inside[None, :]
    if residual is not None:
        acc = plus(acc, tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32))
    acc = activate(acc, ACTIVATION)
    tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def epilogue(acc, scale, shift, residual, out, row, left, m, n, pitch, ACTIVATION: tl.constexpr):
    """Stores an fp32 tile [rows, columns] whose first channel is ``left``.

    ``scale`` and ``shift`` point to one slot's vectors, ``residual`` and ``out`` to its [m, n] matrices with
    rows ``pitch`` elements apart; each but ``out`` may be None. A wide tile goes out in halves: that halves
    its registers.
    """
    WIDE: tl.constexpr = acc.shape[1]
    if acc.shape[0] * WIDE >= 8192:
        halves = tl.permute(tl.reshape(acc, (acc.shape[0], 2, WIDE // 2)), (0, 2, 1))
        one, two = tl.split(halves)
        epilogue(one, scale, shift, residual, out, row, left, m, n, pitch, ACTIVATION)
        epilogue(two, scale, shift, residual, out, row, left + WIDE // 2, m, n, pitch, ACTIVATION)
    else:
        finish(acc, scale, shift, residual, out, row, left + tl.arange(0, WIDE), m, n, pitch, ACTIVATION)


@triton.jit
def working_set(control, slots, PROGRAMS_PER_SM: tl.constexpr, PDL: tl.constexpr):
    """(active slots, programs that share the tiles) from the two words of ``control``.

    What a kernel calls before anything else: it waits for the kernel before it, see :func:`dependent`.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
    active = tl.minimum(tl.load(control), slots)
    programs = tl.maximum(tl.load(control + 1), 1) * PROGRAMS_PER_SM
    return active, tl.minimum(programs, tl.num_programs(0))


@triton.jit
def tile_ends(m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """For vectors of problem sizes: the first tile behind each problem."""
    tiles = ((m + BLOCK_M - 1) // BLOCK_M) * ((n + BLOCK_N - 1) // BLOCK_N)
    return tl.cumsum(tiles.to(tl.int32), 0)


@triton.jit
def find_slot(tile, ends):
    """(slot, tile within that slot) of ``tile`` given what :func:`tile_ends` returned."""
    before = ends <= tile
    return tl.sum(before.to(tl.int32), 0), tile - tl.max(tl.where(before, ends, 0), 0)


@triton.jit
def tile_origin(tile, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """First row and first column of a slot's tile: columns of GROUP row tiles, so that L2 is reused."""
    down = (m + BLOCK_M - 1) // BLOCK_M
    across = (n + BLOCK_N - 1) // BLOCK_N
    group = tile // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    local = tile - group * (GROUP * across)
    return (group * GROUP + local % height) * BLOCK_M, (local // height) * BLOCK_N


@triton.jit
def weight_pointer(table, row, width, column, like, ALIGNED: tl.constexpr):
    """The pointer at ``table[row, column]`` to elements of ``like``'s dtype."""
    address = tl.load(table + row * width + column)
    pointer = address.to(tl.pointer_type(like.dtype.element_ty))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, [16])
    return pointer


@dataclass(frozen=True)
class Launch:
    """One kernel launch, ready to run or to be compiled without a device.

    Attributes:
        arguments: the kernel's, by name, without ``PDL``.
        operation: what it computes.
        plain: it has more predecessors than the launch before it on its stream, so it is no dependent launch.
        registers: most of a thread, None where what Triton takes leaves room for the programs of the tile.
    """

    kernel: Any
    grid: int
    arguments: Mapping[str, Any]
    tile: Tile
    device: torch.device
    operation: Operation
    plain: bool = False
    registers: int | None = None

    @property
    def dependent(self) -> bool:
        """Whether it is a programmatic dependent launch; see :func:`dependent`."""
        return not self.plain and dependent(self.device)

    @property
    def named(self) -> dict[str, Any]:
        """All arguments of the kernel by name."""
        return {**self.arguments, "PDL": self.dependent}

    @property
    def options(self) -> dict[str, Any]:
        """What Triton is told besides the arguments."""
        options: dict[str, Any] = {"num_warps": self.tile.warps, "num_stages": self.tile.stages}
        if self.dependent:
            options["launch_pdl"] = True
        if self.registers is not None:
            options["maxnreg"] = self.registers
        return options

    @property
    def code(self) -> Code:
        """What it runs."""
        named = self.named
        values = [named[parameter.name] for parameter in self.kernel.params]
        types = tuple(value.dtype if isinstance(value, Tensor) else value for value in values)
        return Code(self.kernel, types, self.grid, self.device, tuple(self.options.items()))

    @property
    def variant(self) -> Hashable:
        """Equal for launches that run the same machine code."""
        return self.code.variant

    def build(self) -> None:
        """Compiles the kernel, or finds it in Triton's cache, and loads it on the current device."""
        self.code.build()

    def run(self) -> None:
        """Launches on the current stream, or has whoever intercepts this thread's work see to it.

        It neither synchronises nor allocates, so it may be captured.
        """
        if self.grid == 0:
            return
        launch = handed(self)
        if launch is not None and not isinstance(launch, Turn):
            launch.start()

    def start(self) -> None:
        """Launches on the current stream, whoever intercepts."""
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                self.kernel[(self.grid,)](**self.named, **self.options)
        else:
            self.kernel[(self.grid,)](**self.named, **self.options)


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of ``device``; 1 where the interpreter runs on the CPU."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def dependent(device: torch.device) -> bool:
    """Whether launches on ``device`` are programmatic dependent ones, which compute capability 9 began.

    Such a launch may start when the programs of the one before it on the stream have ended, without the
    flush between two kernels. So every program of every kernel waits first of all, before it reads or writes
    anything: then a kernel has ended only when all before it have, whatever was launched in between.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


#: Compute capabilities on which all tiles of a bit class were compared with ``torch.equal``.
_SETTLED = frozenset({(9, 0)})


@cache
def settled(device: torch.device) -> bool:
    """Whether the tile may follow the number of slots on ``device`` without changing bits."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) in _SETTLED


def divisor(*sizes: int) -> int:
    """The largest power of two up to 16 that divides all ``sizes``."""
    return math.gcd(16, *sizes)


def vector_arguments(name: str, vector: Vector | None) -> dict[str, Any]:
    """The kernel arguments of a per-channel vector."""
    if vector is None:
        return {name: None, f"{name}_width": 0, f"{name}_offset": 0}
    if vector.arena.stride(1) != 1:
        raise ValueError(
            f"the rows of {name}'s arena must be contiguous, not of strides {vector.arena.stride()}"
        )
    return {name: vector.arena, f"{name}_width": vector.arena.stride(0), f"{name}_offset": vector.offset}


def check_operands(
    x: Tensor, out: Tensor, residual: Tensor | None, table: Tensor, rows: Tensor, control: Tensor
) -> None:
    """Raises ValueError for what the kernels do not read rightly."""
    if x.dtype not in SUPPORTED or out.dtype != x.dtype:
        raise ValueError(
            f"the kernels take fp16, bf16 or fp32 in and out alike, not {x.dtype} and {out.dtype}"
        )
    if not (x.is_contiguous() and out.is_contiguous()):
        raise ValueError("x and out must be contiguous")
    if residual is not None and (residual.shape != out.shape or not residual.is_contiguous()):
        raise ValueError(f"residual must be contiguous and of shape {tuple(out.shape)}")
    if table.dtype != torch.int64 or table.stride(1) != 1:
        raise ValueError("table must be int64 [capacity, P] with contiguous rows")
    if rows.dtype != torch.int64 or control.dtype != torch.int32:
        raise ValueError("rows must be int64 and control int32")

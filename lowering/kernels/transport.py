# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,unused-ignore"
"""Copies between callers' own tensors and the slots of a batched buffer: one launch for all slots."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_mux.lowering.kernels.common import Launch, multiprocessors, working_set
from torch_mux.lowering.kernels.data import Tile
from torch_mux.lowering.kernels.operation import copy_operation

__all__ = ["gather", "gather_launch", "scatter", "scatter_launch"]

DIMS = 6
PROGRAMS = 8
BLOCK = 1024
TABLES = ["pointers", "control"]
SIZES = ["slots", "numel", "slot_stride", *(f"{kind}{axis}" for kind in "dbs" for axis in range(DIMS))]
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def move(mine, theirs, mask, TO_BATCH: tl.constexpr):
    """Copies one block of words to or from the batched buffer."""
    if TO_BATCH:
        tl.store(mine, tl.load(theirs, mask=mask), mask=mask)
    else:
        tl.store(theirs, tl.load(mine, mask=mask), mask=mask)


@triton.jit
def move_wide(mine, theirs, length, BLOCK: tl.constexpr, TO_BATCH: tl.constexpr):
    """Copies up to 4·BLOCK bytes between addresses that are multiples of 16, 16 a thread, then the rest."""
    word = tl.arange(0, BLOCK)
    here = tl.multiple_of(mine.to(tl.pointer_type(tl.int32)), [16]) + word
    there = tl.multiple_of(theirs.to(tl.pointer_type(tl.int32)), [16]) + word
    move(here, there, word < (length // 16) * 4, TO_BATCH)
    byte = (length // 16) * 16 + tl.arange(0, 16)
    here = mine.to(tl.pointer_type(tl.int8)) + byte
    there = theirs.to(tl.pointer_type(tl.int8)) + byte
    move(here, there, byte < length, TO_BATCH)


@triton.jit(do_not_specialize=["slots", "numel"], do_not_specialize_on_alignment=TABLES)
def dense_kernel(batched, pointers, control, slots, numel, BLOCK: tl.constexpr,
                 PROGRAMS_PER_SM: tl.constexpr, ITEMSIZE: tl.constexpr, TO_BATCH: tl.constexpr,
                 PDL: tl.constexpr):  # fmt: skip
    """Both sides are one run of ``numel`` elements: 16 bytes a thread where both addresses allow it."""
    active, programs = working_set(control, slots, PROGRAMS_PER_SM, PDL)
    chunk: tl.constexpr = 4 * BLOCK
    size = numel.to(tl.int64) * ITEMSIZE
    each = ((size + chunk - 1) // chunk).to(tl.int32)
    first = tl.program_id(0)
    total = tl.where(first < programs, active * each, 0)
    for tile in range(first, total, programs):
        slot = tile // each
        start = (tile - slot * each).to(tl.int64) * chunk
        theirs = tl.load(pointers + slot) + start
        mine = (batched + slot.to(tl.int64) * numel).to(tl.int64) + start
        left = tl.minimum(size - start, chunk)
        if ((mine | theirs) & 15) == 0:
            move_wide(mine, theirs, left, BLOCK, TO_BATCH)
        else:
            item = tl.arange(0, chunk // ITEMSIZE)
            kind = tl.pointer_type(batched.dtype.element_ty)
            move(mine.to(kind) + item, theirs.to(kind) + item, item < left // ITEMSIZE, TO_BATCH)


@triton.jit
def peel(rest, here, there, size, mine, theirs):
    """Takes the innermost coordinate off a linear index and adds it to both offsets."""
    coordinate = (rest % size).to(tl.int64)
    return rest // size, here + coordinate * mine, there + coordinate * theirs


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TABLES)
def strided_kernel(batched, pointers, control, slots, numel, slot_stride, d0, d1, d2, d3, d4, d5,
                   b0, b1, b2, b3, b4, b5, s0, s1, s2, s3, s4, s5, BLOCK: tl.constexpr,
                   PROGRAMS_PER_SM: tl.constexpr, RANK: tl.constexpr, TO_BATCH: tl.constexpr,
                   PDL: tl.constexpr):  # fmt: skip
    """Axes from the innermost (0) on: sizes d, strides b in the batched tensor and s in the caller's."""
    active, programs = working_set(control, slots, PROGRAMS_PER_SM, PDL)
    each = (numel + BLOCK - 1) // BLOCK
    first = tl.program_id(0)
    total = tl.where(first < programs, active * each, 0)
    for tile in range(first, total, programs):
        slot = tile // each
        index = (tile - slot * each) * BLOCK + tl.arange(0, BLOCK)
        mask = index < numel
        here = tl.zeros((BLOCK,), tl.int64)
        rest, here, there = peel(index, here, here, d0, b0, s0)
        if RANK > 1:
            rest, here, there = peel(rest, here, there, d1, b1, s1)
        if RANK > 2:
            rest, here, there = peel(rest, here, there, d2, b2, s2)
        if RANK > 3:
            rest, here, there = peel(rest, here, there, d3, b3, s3)
        if RANK > 4:
            rest, here, there = peel(rest, here, there, d4, b4, s4)
        if RANK > 5:
            rest, here, there = peel(rest, here, there, d5, b5, s5)
        theirs = tl.load(pointers + slot).to(tl.pointer_type(batched.dtype.element_ty))
        move(batched + slot.to(tl.int64) * slot_stride + here, theirs + there, mask, TO_BATCH)


def axes(shape: Sequence[int], mine: Sequence[int], theirs: Sequence[int]) -> list[tuple[int, int, int]]:
    """(size, stride, stride) of the fewest axes that visit the same elements, innermost first."""
    kept = [axis for axis in zip(shape, mine, theirs, strict=True) if axis[0] != 1]
    kept.sort(key=lambda axis: axis[1])
    merged: list[tuple[int, int, int]] = []
    for size, a, b in kept:
        if merged and a == merged[-1][0] * merged[-1][1] and b == merged[-1][0] * merged[-1][2]:
            merged[-1] = (merged[-1][0] * size, merged[-1][1], merged[-1][2])
        else:
            merged.append((size, a, b))
    return merged or [(1, 1, 1)]


def _words(batched: Tensor, strides: Sequence[int]) -> tuple[Tensor, list[int], list[int], list[int]]:
    """The batched tensor as integers, with one slot's shape and both sides' strides in these."""
    shape, mine, theirs = list(batched.shape[1:]), list(batched.stride()[1:]), list(strides)
    if batched.is_complex():
        batched = torch.view_as_real(batched)
        shape, mine, theirs = [*shape, 2], [*(2 * s for s in mine), 1], [*(2 * s for s in theirs), 1]
    return batched.view(WORDS[batched.dtype.itemsize]), shape, mine, theirs


def _launch(
    batched: Tensor,
    pointers: Tensor,
    control: Tensor,
    strides: Sequence[int],
    to_batch: bool,
    sms: int | None,
) -> Launch:
    if len(strides) != batched.dim() - 1:
        raise ValueError(f"{len(strides)} strides for slots of {batched.dim() - 1} axes")
    if pointers.dtype != torch.int64 or control.dtype != torch.int32 or pointers.numel() < batched.shape[0]:
        raise ValueError("pointers must be int64 with one address a slot, control int32")
    device, slots, numel = batched.device, batched.shape[0], batched[0].numel() if batched.shape[0] else 0
    words, shape, mine, theirs = _words(batched, strides)
    numel = numel * 2 if batched.is_complex() else numel
    found = axes(shape, mine, theirs)
    if len(found) > DIMS:
        raise ValueError(f"a copy of {len(found)} axes that do not merge; at most {DIMS} are supported")
    sms = multiprocessors(device) if sms is None else sms
    named: dict[str, Any] = {"batched": words, "pointers": pointers, "control": control, "slots": slots}
    named |= {"numel": numel, "BLOCK": BLOCK, "PROGRAMS_PER_SM": PROGRAMS, "TO_BATCH": to_batch}
    dense = len(found) == 1 and found[0][1:] == (1, 1) and words.stride(0) == numel
    if dense:
        tiles = slots * -(-numel * words.dtype.itemsize // (4 * BLOCK))
        named["ITEMSIZE"] = words.dtype.itemsize
    else:
        tiles = slots * -(-numel // BLOCK)
        named |= {"slot_stride": words.stride(0), "RANK": len(found)}
        for axis in range(DIMS):
            size, here, there = found[axis] if axis < len(found) else (1, 0, 0)
            named |= {f"d{axis}": size, f"b{axis}": here, f"s{axis}": there}
    kernel = dense_kernel if dense else strided_kernel
    tile, operation = Tile(BLOCK, 1, 16, 4, 1, PROGRAMS), copy_operation(batched, to_batch)
    return Launch(kernel, min(tiles, sms * PROGRAMS), named, tile, device, operation)


def gather_launch(
    pointers: Tensor, batched: Tensor, control: Tensor, strides: Sequence[int], sms: int | None = None
) -> Launch:
    """What :func:`gather` runs; same arguments and errors."""
    return _launch(batched, pointers, control, strides, True, sms)


def scatter_launch(
    batched: Tensor, pointers: Tensor, control: Tensor, strides: Sequence[int], sms: int | None = None
) -> Launch:
    """What :func:`scatter` runs; same arguments and errors."""
    return _launch(batched, pointers, control, strides, False, sms)


def gather(
    pointers: Tensor, batched: Tensor, control: Tensor, strides: Sequence[int], sms: int | None = None
) -> None:
    """Copies the tensor at address ``pointers[t]`` into ``batched[t]`` for every active slot t.

    Args:
        pointers: int64 [≥ T], device addresses of tensors of shape ``batched.shape[1:]``.
        batched: [T, *shape], any dtype; slots need not be contiguous.
        control: int32 [2], active slots and cap in multiprocessors, read on the device. Slots at and behind
            ``control[0]`` are neither read nor written.
        strides: of the callers' tensors, in elements; 0 for expanded axes.
        sms: multiprocessors, instead of the device's.

    Raises:
        ValueError: other dtypes or lengths, or more than 6 axes that do not merge.
    """
    gather_launch(pointers, batched, control, strides, sms).run()


def scatter(
    batched: Tensor, pointers: Tensor, control: Tensor, strides: Sequence[int], sms: int | None = None
) -> None:
    """Copies ``batched[t]`` into the tensor at address ``pointers[t]``: the reverse of :func:`gather`.

    Args:
        batched, pointers, control, strides, sms: as for :func:`gather`; no stride of an axis longer than 1
            may be 0.

    Raises:
        ValueError: as :func:`gather`, or a stride of 0.
    """
    if any(size > 1 and stride == 0 for size, stride in zip(batched.shape[1:], strides, strict=False)):
        raise ValueError("cannot scatter into an expanded tensor: its elements overlap")
    scatter_launch(batched, pointers, control, strides, sms).run()

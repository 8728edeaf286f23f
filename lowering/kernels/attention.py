# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,unused-ignore"
"""The super-kernel of scaled dot-product attention: one launch for every slot's heads.

Queries, keys and values are read where they lie, through strides: in the joint buffer of the linear layers
that made them, say. One pass over the keys with the softmax kept up to date (Milakov and Gimelshein, "Online
normalizer calculation for softmax", 2018; Dao, "FlashAttention-2", 2023), so nothing but the result is
written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_mux.lowering.kernels import choose_attention
from torch_mux.lowering.kernels.common import (
    SUPPORTED,
    Launch,
    divisor,
    multiprocessors,
    settled,
    working_set,
)
from torch_mux.lowering.kernels.data import BitClass, Tile
from torch_mux.lowering.kernels.operation import attention_operation

__all__ = ["attention", "attention_launch"]

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def queries(query, row, depth, m, d, q_row, EVEN_D: tl.constexpr):
    """[queries, channels] of one head, 0 past the ends."""
    inside = (row < m)[:, None] if EVEN_D else (row < m)[:, None] & (depth < d)[None, :]
    return tl.load(query + row[:, None] * q_row + depth[None, :], mask=inside, other=0.0)


@triton.jit
def values(value, column, channel, n, dv, v_row, EVEN_N: tl.constexpr, EVEN_V: tl.constexpr):
    """[keys, channels] of one head, 0 past the ends."""
    at = value + column[:, None] * v_row + channel[None, :]
    if EVEN_N and EVEN_V:
        return tl.load(at)
    elif EVEN_V:
        return tl.load(at, mask=(column < n)[:, None], other=0.0)
    else:
        return tl.load(at, mask=(column < n)[:, None] & (channel < dv)[None, :], other=0.0)


@triton.jit
def attend(query, key, value, mask, row, m, n, d, dv, scale, q_row, k_row, v_row, mask_row,
           BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
           STEP: tl.constexpr, EVEN_N: tl.constexpr, EVEN_D: tl.constexpr, EVEN_V: tl.constexpr,
           CAUSAL: tl.constexpr, MASK_ROWS: tl.constexpr, LATE: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    """One fp32 [BLOCK_M, BLOCK_V] tile of one head; keys in steps of BLOCK_N, always in the same order."""
    inner, channel = tl.arange(0, STEP), tl.arange(0, BLOCK_V)
    if STEP == BLOCK_D:
        q = queries(query, row, inner, m, d, q_row, EVEN_D)
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    weight = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    end = tl.minimum(n, tl.max(row, 0) + 1) if CAUSAL else n
    for start in range(0, end, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        known = column < n
        if mask is not None:  # loaded before the product, or Triton lays the softmax out twice
            if MASK_ROWS:
                terms_at = mask + tl.minimum(row, m - 1)[:, None] * mask_row + column[None, :]
                added = tl.load(terms_at) if EVEN_N else tl.load(terms_at, mask=known[None, :], other=0.0)
            else:
                added = tl.load(mask + column, mask=known, other=0.0)[None, :]
        k_at = key + inner[:, None] + column[None, :] * k_row
        score = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for part in tl.static_range(BLOCK_D // STEP):
            depth = part * STEP + inner
            if STEP != BLOCK_D:
                q = queries(query, row, depth, m, d, q_row, EVEN_D)
            if EVEN_N and EVEN_D:
                k = tl.load(k_at + part * STEP)
            elif EVEN_D:
                k = tl.load(k_at + part * STEP, mask=known[None, :], other=0.0)
            else:
                k = tl.load(k_at + part * STEP, mask=known[None, :] & (depth < d)[:, None], other=0.0)
            score = tl.dot(q, k, score, input_precision=PRECISION)
        factor = scale * LOG2_E
        if not LATE:
            score *= factor
        if mask is not None:
            score += added.to(tl.float32) * LOG2_E
        if CAUSAL:
            score = tl.where(known[None, :] & (column[None, :] <= row[:, None]), score, float("-inf"))
        elif not EVEN_N:
            score = tl.where(known[None, :], score, float("-inf"))
        highest = tl.maximum(peak, tl.max(score, 1))
        # With a mask a row may see nothing so far.
        level = highest if mask is None else tl.where(highest == float("-inf"), 0.0, highest)
        if LATE:  # the largest score is the largest scaled one: one multiply-add scales and shifts
            shift = tl.broadcast_to((-level * factor)[:, None], score.shape)
            share = tl.math.exp2(tl.math.fma(score, tl.full(score.shape, 1.0, tl.float32) * factor, shift))
            shrink = tl.math.exp2((peak - level) * factor)
        else:
            share = tl.math.exp2(score - level[:, None])
            shrink = tl.math.exp2(peak - level)
        weight = weight * shrink + tl.sum(share, 1)
        v = values(value, column, channel, n, dv, v_row, EVEN_N, EVEN_V)
        acc = tl.dot(share.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        peak = highest
    return acc / tl.where(weight == 0.0, 1.0, weight)[:, None]


STRIDES = [f"{name}_{axis}" for name in ("q", "k", "v", "mask") for axis in ("slot", "image", "head", "row")]
SIZES = ["slots", "images", "heads", "shared", "m", "n", "d", "dv", "scale", *STRIDES]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["control"])
def attention_kernel(query, key, value, mask, control, out, slots, images, heads, shared, m, n, d, dv, scale,
                     q_slot, q_image, q_head, q_row, k_slot, k_image, k_head, k_row, v_slot, v_image, v_head,
                     v_row, mask_slot, mask_image, mask_head, mask_row,
                     BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                     BLOCK_V: tl.constexpr, STEP: tl.constexpr, EVEN_N: tl.constexpr, DIV: tl.constexpr,
                     D_DIV: tl.constexpr, V_DIV: tl.constexpr, CAUSAL: tl.constexpr,
                     PRECISION: tl.constexpr, PROGRAMS_PER_SM: tl.constexpr, EVEN_D: tl.constexpr,
                     EVEN_V: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_DIV: tl.constexpr,
                     LATE: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Programs take tiles in slot order until those of the active slots are done; a tile is some queries of
    one head, and the tiles of a head follow one another, so that its keys and values come from the caches."""
    active, programs = working_set(control, slots, PROGRAMS_PER_SM, PDL)
    d, dv = (d // D_DIV) * D_DIV, (dv // V_DIV) * V_DIV
    q_row, k_row, v_row = (q_row // DIV) * DIV, (k_row // DIV) * DIV, (v_row // DIV) * DIV
    mask_row = (mask_row // MASK_DIV) * MASK_DIV
    down = (m + BLOCK_M - 1) // BLOCK_M
    each = images * heads * down
    first = tl.program_id(0)
    total = tl.where(first < programs, active * each, 0)
    for tile in range(first, total, programs):
        slot = tile // each
        local = tile - slot * each
        head = local // down
        row = (local - head * down) * BLOCK_M + tl.arange(0, BLOCK_M)
        image = head // heads
        head = head - image * heads
        at = slot.to(tl.int64)
        q_at = ((at * q_slot + image * q_image + head * q_head) // DIV) * DIV
        k_at = ((at * k_slot + image * k_image + head // shared * k_head) // DIV) * DIV
        v_at = ((at * v_slot + image * v_image + head // shared * v_head) // DIV) * DIV
        terms = None
        if mask is not None:
            terms_at = at * mask_slot + image * mask_image + head * mask_head
            terms = mask + (terms_at // MASK_DIV) * MASK_DIV
        acc = attend(query + q_at, key + k_at, value + v_at, terms, row, m, n, d, dv, scale, q_row, k_row,
                     v_row, mask_row, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V, STEP, EVEN_N, EVEN_D, EVEN_V,
                     CAUSAL, MASK_ROWS, LATE, PRECISION)  # fmt: skip
        channel = tl.arange(0, BLOCK_V)
        line = (at * images + image) * m + row
        target = out + (line * heads + head)[:, None] * dv + channel[None, :]
        tl.store(target, acc.to(out.dtype.element_ty), mask=(row < m)[:, None] & (channel < dv)[None, :])


def _strides(name: str, tensor: Tensor | None) -> dict[str, int]:
    """Strides of slot, image, head and row as kernel arguments; 0 along what has a single element."""
    axes = ("slot", "image", "head", "row")
    if tensor is None:
        return {f"{name}_{axis}": 0 for axis in axes}
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    steps = [0 if size == 1 else stride for size, stride in pairs]
    return {f"{name}_{axis}": step for axis, step in zip(axes, steps[:4], strict=True)}


def _check(
    query: Tensor, key: Tensor, value: Tensor, control: Tensor, out: Tensor, mask: Tensor | None
) -> None:
    slots, images, heads, m, d = query.shape
    n, dv = value.shape[-2:]
    if query.dtype not in SUPPORTED or {key.dtype, value.dtype, out.dtype} != {query.dtype}:
        raise ValueError(f"attention takes fp16, bf16 or fp32 throughout, not {query.dtype} and {key.dtype}")
    shared = key.shape[2]
    if key.shape != (slots, images, shared, n, d) or value.shape != (slots, images, shared, n, dv):
        raise ValueError(f"keys {tuple(key.shape)} and values {tuple(value.shape)} do not fit the queries")
    if heads % max(1, shared) != 0:
        raise ValueError(f"{heads} heads of queries cannot share {shared} of keys")
    if out.shape != (slots, images, m, heads, dv) or not out.is_contiguous():
        raise ValueError(f"out must be contiguous and {(slots, images, m, heads, dv)}")
    if mask is not None:
        whole = (slots, images, heads, m, n)
        fits = all(size in (1, full) for size, full in zip(mask.shape, whole, strict=True))
        if not mask.dtype.is_floating_point or not fits or mask.shape[-1] != n:
            raise ValueError(f"mask must be added and broadcast to {whole}, not {tuple(mask.shape)}")
    for tensor in (query, key, value) if mask is None else (query, key, value, mask):
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError("the last dimension of queries, keys, values and mask must be dense")
        steps = zip(tensor.shape[1:], tensor.stride()[1:], strict=True)
        reach = sum((size - 1) * stride for size, stride in steps)
        if reach >= 2**31:
            raise ValueError("a slot's operands must reach over less than 2**31 elements each")
    if control.dtype != torch.int32:
        raise ValueError("control must be int32")


def attention_launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    control: Tensor,
    out: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    allow_tf32: bool = False,
    tile: Tile | None = None,
    bit_class: BitClass | None = None,
    sms: int | None = None,
) -> Launch:
    """What :func:`attention` runs; same arguments and errors."""
    _check(query, key, value, control, out, mask)
    slots, images, heads, m, d = query.shape
    n, dv = value.shape[-2:]
    sms = multiprocessors(query.device) if sms is None else sms
    size = choose_attention.Size(m, n, d, dv)
    if bit_class is None:
        bit_class = choose_attention.bit_class(size, query.dtype, allow_tf32)
    if tile is None:
        tile = choose_attention.tile(
            size,
            slots * images * heads,
            query.dtype,
            bit_class,
            sms,
            mask is not None,
            is_causal,
            settled(query.device),
        )
    choose_attention.check(tile, bit_class)
    block_d, block_v = choose_attention.padded(d), choose_attention.padded(dv)
    steps = _strides("q", query) | _strides("k", key) | _strides("v", value)
    mask_steps, factor = _strides("mask", mask), float(d**-0.5 if scale is None else scale)
    arguments = {
        "query": query, "key": key, "value": value, "mask": mask, "control": control, "out": out,
        "slots": slots, "images": images, "heads": heads, "shared": heads // max(1, key.shape[2]),
        "m": m, "n": n, "d": d, "dv": dv, "scale": factor,
        **steps, **mask_steps,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_k, "BLOCK_D": block_d, "BLOCK_V": block_v,
        "STEP": min(block_d, choose_attention.depth(bit_class)), "EVEN_N": n % tile.block_k == 0,
        "EVEN_D": d == block_d, "EVEN_V": dv == block_v,
        "DIV": divisor(*steps.values()), "D_DIV": divisor(d), "V_DIV": divisor(dv),
        "MASK_ROWS": mask is not None and mask.shape[3] > 1, "MASK_DIV": divisor(*mask_steps.values()),
        "LATE": mask is None and factor > 0.0, "CAUSAL": is_causal, "PRECISION": bit_class.precision,
        "PROGRAMS_PER_SM": tile.programs_per_sm,
    }  # fmt: skip
    tiles = slots * images * heads * -(-m // tile.block_m)
    operation = attention_operation(query, key, value, bit_class)
    programs = min(tiles, sms * tile.programs_per_sm)
    return Launch(attention_kernel, programs, arguments, tile, query.device, operation)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    control: Tensor,
    out: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    allow_tf32: bool = False,
    tile: Tile | None = None,
    bit_class: BitClass | None = None,
    sms: int | None = None,
) -> None:
    """``out[t] = softmax(query[t] @ key[t].T * scale + mask[t]) @ value[t]``, head by head, t active.

    Scores, softmax and sums are fp32; its weights are rounded to the dtype of the values once, the result
    once. A row whose every key the mask excludes is 0. Bits depend on (M, N, D, DV), dtype, mask or none and
    ``allow_tf32`` only: not on T, slot, cap or how many slots are active. Slots at and behind ``control[0]``
    are neither read nor written.

    Args:
        query: [T, B, H, M, D], fp16, bf16 or fp32, any strides with D dense.
        key: [T, B, G, N, D] likewise; H is a multiple of G, and H / G neighbouring heads share keys.
        value: [T, B, G, N, DV] likewise.
        control: int32 [2], active slots and cap in multiprocessors, read on the device.
        out: [T, B, M, H, DV] contiguous, of the same dtype.
        mask: floating point, added to the scores; [T, B, H, M, N] with 1 where it is the same for all, N
            dense. None: nothing.
        is_causal: query i sees keys 0 … i only.
        scale: D ** -0.5 by default.
        allow_tf32: fp32 operands are rounded to tf32 for the tensor cores.
        tile, bit_class, sms: instead of what :mod:`choose_attention` and the device say.

    Raises:
        ValueError: an operand the kernel cannot read, or a tile outside the bit class.
    """
    attention_launch(
        query, key, value, control, out, mask=mask, is_causal=is_causal, scale=scale, allow_tf32=allow_tf32,
        tile=tile, bit_class=bit_class, sms=sms,
    ).run()  # fmt: skip

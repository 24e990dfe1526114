"""Rotary embedding of the queries and keys of a step, in one launch.

B sequences, S columns of each, Hq query heads, Hk key heads, D numbers of a head, of which the first R are
rotated.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_HEADS = 4  # heads of a program


@triton.jit
def rotate_rows(
    source, target, x_cos, y_cos, x_sin, y_sin, column, tail, live, HALF: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Rotate rows of heads; each product is rounded to their dtype, as torch rounds it.

    Args:
        source: [BH] pointers to the first number of each head.
        target: [BH] pointers to the first number of each result.
        x_cos: [BW] factors of the first half of a head.
        y_cos: [BW] factors of the second half.
        x_sin: [BW] factors of the second half in the first half's result.
        y_sin: [BW] factors of the first half in the second half's result.
        column: [BW] 0 to BW - 1.
        tail: [BT] 0 to BT - 1.
        live: [BH] True for heads that exist.
        HALF: half of the numbers that are rotated.
        TAIL: numbers behind them, which are copied.
    """
    inside = live[:, None] & (column < HALF)[None, :]
    x = tl.load(source[:, None] + column[None, :], mask=inside, other=0.0)
    y = tl.load(source[:, None] + HALF + column[None, :], mask=inside, other=0.0)
    kind: tl.constexpr = x.dtype
    wide_x, wide_y = x.to(tl.float32), y.to(tl.float32)
    first = (wide_x * x_cos[None, :]).to(kind).to(tl.float32)
    first -= (wide_y * x_sin[None, :]).to(kind).to(tl.float32)
    second = (wide_y * y_cos[None, :]).to(kind).to(tl.float32)
    second += (wide_x * y_sin[None, :]).to(kind).to(tl.float32)
    tl.store(target[:, None] + column[None, :], first.to(kind), mask=inside)
    tl.store(target[:, None] + HALF + column[None, :], second.to(kind), mask=inside)
    if TAIL > 0:
        behind = live[:, None] & (tail < TAIL)[None, :]
        rest = tl.load(source[:, None] + 2 * HALF + tail[None, :], mask=behind, other=0.0)
        tl.store(target[:, None] + 2 * HALF + tail[None, :], rest, mask=behind)


@triton.jit(do_not_specialize=["columns"])
def rotary_kernel(
    q,  # [B, Hq, S, D]
    k,  # [B, Hk, S, D]
    cos,  # [B or 1, S, R or R / 2]
    sin,  # [B or 1, S, R or R / 2]
    q_out,  # [B, Hq, S, D], result
    k_out,  # [B, Hk, S, D], result
    columns,  # S
    q_batch,  # elements from one sequence of q to the next
    q_head,  # elements from one head of q to the next
    q_column,  # elements from one column of q to the next
    k_batch,  # elements from one sequence of k to the next
    k_head,  # elements from one head of k to the next
    k_column,  # elements from one column of k to the next
    q_out_batch,  # elements from one sequence of q_out to the next
    q_out_head,  # elements from one head of q_out to the next
    q_out_column,  # elements from one column of q_out to the next
    k_out_batch,  # elements from one sequence of k_out to the next
    k_out_head,  # elements from one head of k_out to the next
    k_out_column,  # elements from one column of k_out to the next
    cos_batch,  # elements from one sequence of cos and sin to the next, 0 where all share one
    cos_column,  # elements from one column of cos and sin to the next
    HQ: tl.constexpr,  # query heads
    HK: tl.constexpr,  # key heads
    HALF: tl.constexpr,  # R / 2
    TAIL: tl.constexpr,  # D - R, numbers that are copied
    SECOND: tl.constexpr,  # R / 2 if both halves have factors of their own, 0 if they share them
    BH: tl.constexpr,  # heads of a program
    BW: tl.constexpr,  # a power of 2 of at least HALF and 1
    BT: tl.constexpr,  # a power of 2 of at least TAIL
):
    """Rotate a few heads of one token; grid: tokens, blocks of query heads, then of key heads."""
    token = tl.program_id(0).to(tl.int64)
    b, s = token // columns, token % columns
    column, tail = tl.arange(0, BW), tl.arange(0, BT)
    known = column < HALF
    at = b * cos_batch + s * cos_column + column
    x_cos = tl.load(cos + at, mask=known, other=0.0).to(tl.float32)
    y_cos = tl.load(cos + at + SECOND, mask=known, other=0.0).to(tl.float32)
    x_sin = tl.load(sin + at, mask=known, other=0.0).to(tl.float32)
    y_sin = tl.load(sin + at + SECOND, mask=known, other=0.0).to(tl.float32)
    BLOCKS: tl.constexpr = (HQ + BH - 1) // BH
    block = tl.program_id(1)
    if block < BLOCKS:
        head = (block * BH + tl.arange(0, BH)).to(tl.int64)
        rotate_rows(
            q + b * q_batch + head * q_head + s * q_column,
            q_out + b * q_out_batch + head * q_out_head + s * q_out_column,
            x_cos, y_cos, x_sin, y_sin, column, tail, head < HQ, HALF, TAIL,
        )  # fmt: skip
    else:
        head = ((block - BLOCKS) * BH + tl.arange(0, BH)).to(tl.int64)
        rotate_rows(
            k + b * k_batch + head * k_head + s * k_column,
            k_out + b * k_out_batch + head * k_out_head + s * k_out_column,
            x_cos, y_cos, x_sin, y_sin, column, tail, head < HK, HALF, TAIL,
        )  # fmt: skip


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, shares_factors: bool) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys: bits of :func:`xpar.engine.models.fused_rotary.rotate_by_definition`.

    Args:
        q: [B, Hq, S, D], the last dimension dense.
        k: [B, Hk, S, D], the last dimension dense, in q's dtype.
        cos: [B or 1, S, R], or [B or 1, S, R / 2] with ``shares_factors``; in q's dtype.
        sin: As ``cos``.
        shares_factors: True if both halves of a head have the same factors.

    Returns:
        Both results, which lie in memory as ``q`` and ``k`` do.
    """
    batch, q_heads, columns, width = q.shape
    k_heads = k.shape[1]
    half = cos.shape[-1] if shares_factors else cos.shape[-1] // 2
    cos, sin = (x if x.is_contiguous() else x.contiguous() for x in (cos, sin))
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    if not q.numel() + k.numel():
        return q_out, k_out
    tail = width - 2 * half
    blocks = triton.cdiv(q_heads, _HEADS) + triton.cdiv(k_heads, _HEADS)
    rotary_kernel[(batch * columns, blocks)](
        q, k, cos, sin, q_out, k_out, columns,
        *q.stride()[:3], *k.stride()[:3], *q_out.stride()[:3], *k_out.stride()[:3],
        cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1),
        HQ=q_heads, HK=k_heads, HALF=half, TAIL=tail, SECOND=0 if shares_factors else half,
        BH=_HEADS, BW=triton.next_power_of_2(max(half, 1)), BT=triton.next_power_of_2(max(tail, 1)),
        num_warps=4, enable_fp_fusion=False,  # which would not round the products
    )  # fmt: skip
    return q_out, k_out

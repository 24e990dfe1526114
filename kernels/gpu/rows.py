"""Gathering and summing rows on a GPU: the functions of :mod:`xpar.kernels.rows` for tensors that live there.

Sums are in the order given, in float32, without atomics, and are rounded once. Nothing here waits for the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

_COLUMNS = 1024
_GATHERED = 8  # rows of one program


@triton.jit
def weighted_sum_kernel(
    rows, weights, positions, shared, residual, out,
    H: tl.constexpr, TOP_K: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out[m] = sum_j weights[m, j] * rows[positions[m, j]] (+ shared[m]) (+ residual[m])``; grid (M, columns).

    IN_PLACE: slot (m, j) is row m TOP_K + j, and ``positions`` only says by a negative value that there is none.
    """
    entry = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(TOP_K):
        slot = entry * TOP_K + j
        position = tl.load(positions + slot).to(tl.int64)
        live = inside & (position >= 0)
        weight = tl.load(weights + slot, mask=position >= 0, other=0.0)
        if IN_PLACE:
            position = slot
        total += weight * tl.load(rows + position * H + column, mask=live, other=0.0).to(tl.float32)
    if shared is not None:
        total += tl.load(shared + entry * H + column, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        total += tl.load(residual + entry * H + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + entry * H + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def sum_runs_kernel(rows, index, bounds, out, H: tl.constexpr, BLOCK: tl.constexpr):
    """``out[t] = sum of rows[index[bounds[t] : bounds[t + 1]]]``; grid (T, columns)."""
    run = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(tl.load(bounds + run), tl.load(bounds + run + 1)):
        row = tl.load(index + i)
        total += tl.load(rows + row * H + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + run * H + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def gather_kernel(x, index, out, count, H: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """``out[r] = x[index[r]]``; grid (rows, columns)."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(index + r, mask=r < count, other=0)
    live = (r < count)[:, None] & (column < H)[None, :]
    value = tl.load(x + row[:, None] * H + column[None, :], mask=live, other=0)
    tl.store(out + r.to(tl.int64)[:, None] * H + column[None, :], value, mask=live)


def weighted_sum(
    slot_rows: Tensor,
    weights: Tensor,
    positions: Tensor,
    out: Tensor | None = None,
    *,
    shared: Tensor | None = None,
    residual: Tensor | None = None,
    in_place: bool = False,
) -> Tensor:
    """See :func:`xpar.kernels.rows.weighted_sum`; ``shared`` and ``residual`` [M, H] are added before the rounding.

    ``in_place``: slot (m, j) is row ``m k + j`` of ``slot_rows``, and ``positions`` [M, k] of any integer dtype only
    marks the slots that there are none of by a negative value.
    """
    entries, top_k = positions.shape
    h = slot_rows.shape[1]
    total = _target(out, slot_rows, entries)
    if entries and h:
        weighted_sum_kernel[_grid(entries, h)](
            slot_rows, weights.float().contiguous(), positions.contiguous(), shared, residual, total,
            H=h, TOP_K=top_k, IN_PLACE=in_place, BLOCK=_COLUMNS, num_warps=4,
        )  # fmt: skip
    return total if out is None or out is total else out.copy_(total)


def sum_runs(rows: Tensor, index: Tensor, sizes: Tensor) -> Tensor:
    """See :func:`xpar.kernels.rows.sum_runs`."""
    return _sum_between(rows, index, functional.pad(sizes.cumsum(0), (1, 0)))


def sum_rows(rows: Tensor, index: Tensor, num_out: int) -> Tensor:
    """See :func:`xpar.kernels.rows.sum_rows`."""
    targets, order = torch.sort(index, stable=True)
    return _sum_between(
        rows, order, torch.searchsorted(targets, torch.arange(num_out + 1, device=rows.device))
    )


def gather_rows(x: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
    """See :func:`xpar.kernels.rows.gather_rows`."""
    count, h = index.shape[0], x.shape[1]
    result = _target(out, x, count)
    if count and h:
        block = min(_COLUMNS, triton.next_power_of_2(h))
        gather_kernel[(triton.cdiv(count, _GATHERED), triton.cdiv(h, block))](
            x.contiguous(), index.contiguous(), result, count, H=h, ROWS=_GATHERED, BLOCK=block, num_warps=4
        )
    return result if out is None or out is result else out.copy_(result)


def _sum_between(rows: Tensor, index: Tensor, bounds: Tensor) -> Tensor:
    out = rows.new_empty(bounds.shape[0] - 1, rows.shape[1])
    if out.numel():
        sum_runs_kernel[_grid(*out.shape)](
            rows.contiguous(), index.contiguous(), bounds, out, H=out.shape[1], BLOCK=_COLUMNS, num_warps=4
        )
    return out


def _grid(entries: int, width: int) -> tuple[int, int]:
    return entries, triton.cdiv(width, _COLUMNS)


def _target(out: Tensor | None, like: Tensor, count: int) -> Tensor:
    """``out`` itself where a kernel can write it."""
    if out is not None and out.is_contiguous() and out.dtype == like.dtype:
        return out
    return like.new_empty(count, like.shape[1])

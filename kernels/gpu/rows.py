"""Gathering and summing rows on a GPU, behind :mod:`xpar.kernels.rows`.

Sums are in the order given, in float32, without atomics, and are rounded once. No function waits for the
device. Tensors in kernels are contiguous: the stride of a row is its length.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from xpar.kernels.gpu.dependent_launch import launch_options, wait_for_launch_before

_COLUMNS = 1024  # columns of one program
_GATHERED_ROWS = 8  # rows of one program


@triton.jit
def weighted_sum_kernel(
    rows,  # [S, H], outputs of slots
    weights,  # [M, TOP_K] float32; not read for a slot without a row
    positions,  # [M, TOP_K] integer, row of each slot, negative for none; if IN_PLACE only the sign counts
    shared,  # [M, H], added to the sum (the shared experts' output), or None
    residual,  # [M, H], added to the sum (the decoder's residual), or None
    out,  # [M, H], result
    H: tl.constexpr,  # elements of a row
    TOP_K: tl.constexpr,  # slots of an entry
    IN_PLACE: tl.constexpr,  # True if slot (m, j) is row m * TOP_K + j of rows
    BLOCK: tl.constexpr,  # columns of a program
    DEPENDENT: tl.constexpr,  # True if this launch may begin before the one before it has ended
):
    """Compute ``out[m]``, the weighted sum of an entry's slots plus ``shared`` and ``residual``.

    ``out[m] = sum_j weights[m, j] * rows[positions[m, j]] + shared[m] + residual[m]``. Grid: entries, blocks
    of columns.
    """
    wait_for_launch_before(DEPENDENT)
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
def sum_runs_kernel(
    rows,  # [N, H]
    index,  # [bounds[-1]] int64, row of each addend
    bounds,  # [M + 1] int64, first addend of each sum, then their number
    out,  # [M, H], result
    H: tl.constexpr,  # elements of a row
    BLOCK: tl.constexpr,  # columns of a program
):
    """Sum ``rows[index[bounds[m] : bounds[m + 1]]]``; grid: sums, blocks of columns."""
    run = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(tl.load(bounds + run), tl.load(bounds + run + 1)):
        row = tl.load(index + i)
        total += tl.load(rows + row * H + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + run * H + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def gather_kernel(
    x,  # [N, H]
    index,  # [count] int64
    out,  # [count, H], result
    count,  # rows of the result
    H: tl.constexpr,  # elements of a row
    ROWS: tl.constexpr,  # rows of a program
    BLOCK: tl.constexpr,  # columns of a program
):
    """Copy ``out[r] = x[index[r]]``; grid: blocks of rows, blocks of columns."""
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
    dependent: bool = False,
) -> Tensor:
    """Return each entry's weighted sum, as :func:`xpar.kernels.rows.weighted_sum` defines it.

    Args:
        slot_rows: [S, H].
        weights: [M, k] float32.
        positions: [M, k], any integer dtype; negative for no row.
        out: [M, H] for the result, or None.
        shared: [M, H], added before the rounding, or None.
        residual: [M, H], added before the rounding, or None.
        in_place: True if slot (m, j) is row m k + j of ``slot_rows``; then only the sign of a position
            counts.
        dependent: True if the launch may begin before the one before it has ended.
    """
    entries, top_k = positions.shape
    h = slot_rows.shape[1]
    total = _choose_target(out, slot_rows, entries)
    if entries and h:
        weighted_sum_kernel[_row_grid(entries, h)](
            slot_rows, weights.float().contiguous(), positions.contiguous(), shared, residual, total,
            H=h, TOP_K=top_k, IN_PLACE=in_place, BLOCK=_COLUMNS, num_warps=4, **launch_options(dependent),
        )  # fmt: skip
    return total if out is None or out is total else out.copy_(total)


def sum_runs(rows: Tensor, index: Tensor, sizes: Tensor) -> Tensor:
    """Return the sums that :func:`xpar.kernels.rows.sum_runs` defines."""
    return _sum_between(rows, index, functional.pad(sizes.cumsum(0), (1, 0)))


def sum_rows(rows: Tensor, index: Tensor, num_out: int) -> Tensor:
    """Return the sums that :func:`xpar.kernels.rows.sum_rows` defines."""
    targets, order = torch.sort(index, stable=True)
    return _sum_between(
        rows, order, torch.searchsorted(targets, torch.arange(num_out + 1, device=rows.device))
    )


def gather_rows(x: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the rows that :func:`xpar.kernels.rows.gather_rows` defines."""
    count, h = index.shape[0], x.shape[1]
    result = _choose_target(out, x, count)
    if count and h:
        block = min(_COLUMNS, triton.next_power_of_2(h))
        gather_kernel[(triton.cdiv(count, _GATHERED_ROWS), triton.cdiv(h, block))](
            x.contiguous(), index.contiguous(), result, count,
            H=h, ROWS=_GATHERED_ROWS, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return result if out is None or out is result else out.copy_(result)


def _sum_between(rows: Tensor, index: Tensor, bounds: Tensor) -> Tensor:
    out = rows.new_empty(bounds.shape[0] - 1, rows.shape[1])
    if out.numel():
        sum_runs_kernel[_row_grid(*out.shape)](
            rows.contiguous(), index.contiguous(), bounds, out, H=out.shape[1], BLOCK=_COLUMNS, num_warps=4
        )
    return out


def _row_grid(entries: int, width: int) -> tuple[int, int]:
    return entries, triton.cdiv(width, _COLUMNS)


def _choose_target(out: Tensor | None, like: Tensor, count: int) -> Tensor:
    """Return ``out`` if a kernel can write it, else a new tensor [count, H] like ``like``."""
    if out is not None and out.is_contiguous() and out.dtype == like.dtype:
        return out
    return like.new_empty(count, like.shape[1])

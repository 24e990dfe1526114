"""Moving and adding rows: grouping slots by expert, gathering, and sums in slot order with one rounding.

Sums go through ``embedding_bag``: it reads each row once, in the order given, and accumulates in fp32. It wants
weights in the rows' own dtype, so an fp32 router weight is handed over as a few addends of that dtype whose sum
is the weight (three bfloat16 hold all 24 bits of it; two float16 hold it to 2^-25): no fp32 copy of the rows is
made. Rows on a GPU are moved and summed by :mod:`xpar.kernels.gpu.rows`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

# How many numbers of the dtype it takes to hold an fp32 significand.
_ADDENDS = {torch.bfloat16: 3, torch.float16: 2, torch.float32: 1, torch.float64: 1}
GPU_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Groups:
    """Active slots in expert order; slots of one expert keep their (entry, slot) order.

    ``entry``: [S] int64, the entry of each sorted slot. ``positions``: [M, k] int64, where each slot ended up,
    -1 for an inactive one. ``counts``: slots of each expert.
    """

    entry: Tensor
    positions: Tensor
    counts: tuple[int, ...]

    def spans(self) -> list[tuple[int, int, int]]:
        """(expert, first, end) of every expert that has slots, as ranges of sorted slots."""
        spans, first = [], 0
        for expert, count in enumerate(self.counts):
            if count:
                spans.append((expert, first, first + count))
            first += count
        return spans


def group_by_expert(topk_ids: Tensor, num_experts: int) -> Groups:
    """Group the active slots of ``topk_ids`` [M, k] (ids in ``[-1, num_experts)``) by expert."""
    flat = topk_ids.reshape(-1)
    counts = torch.bincount(flat + 1, minlength=num_experts + 1).tolist()
    if len(counts) > num_experts + 1:
        raise ValueError(f"topk_ids holds {len(counts) - 2}: local expert ids lie in [-1, {num_experts})")
    dropped = counts[0]
    order = torch.sort(flat, stable=True).indices
    positions = torch.empty_like(order)
    positions[order] = torch.arange(-dropped, flat.numel() - dropped, device=flat.device)
    if dropped:
        positions.clamp_(min=-1)
        order = order[dropped:]
    entry = torch.div(order, topk_ids.shape[1], rounding_mode="floor")
    return Groups(entry, positions.view(topk_ids.shape), tuple(counts[1:]))


def gather_rows(x: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
    """``x[index]``: [R, H] for ``x`` [N, H] and ``index`` [R] int64, written into ``out`` where given."""
    if _on_gpu(x):
        from xpar.kernels.gpu import rows as gpu

        return gpu.gather_rows(x, index, out)
    return torch.index_select(x, 0, index) if out is None else torch.index_select(x, 0, index, out=out)


def active_rows(rows: Tensor, positions: Tensor) -> Tensor:
    """The rows named by the positions that are not -1, in (entry, slot) order: [S, H]."""
    flat = positions.reshape(-1)
    return rows.index_select(0, flat[flat >= 0])


def weighted_sum(slot_rows: Tensor, weights: Tensor, positions: Tensor, out: Tensor | None = None) -> Tensor:
    """Each entry's ``sum_j weights[m, j] * slot_rows[positions[m, j]]``: [M, H] in the rows' dtype.

    ``slot_rows`` [S, H], ``weights`` [M, k] float32, ``positions`` [M, k] int64 with -1 for "no row" (its weight
    is not read). Added in slot order in fp32, rounded once; a row's bits do not depend on the other rows.
    """
    if _on_gpu(slot_rows):
        from xpar.kernels.gpu import rows as gpu

        return gpu.weighted_sum(slot_rows, weights, positions, out)
    if not slot_rows.shape[0] or not positions.numel():
        total = slot_rows.new_zeros(positions.shape[0], slot_rows.shape[1])
        return total if out is None else out.copy_(total)
    addends = _split(weights, slot_rows.dtype)
    n = addends.shape[-1]
    active = positions >= 0
    if bool(active.all()):
        index = positions[..., None].expand(-1, -1, n).reshape(positions.shape[0], -1)
        total = functional.embedding_bag(
            index, slot_rows, mode="sum", per_sample_weights=addends.reshape(index.shape)
        )
    else:
        index = positions[active][:, None].expand(-1, n).reshape(-1)
        total = _bags(slot_rows, index, active.sum(1) * n, addends[active].reshape(-1))
    return total if out is None else out.copy_(total)


def sum_rows(rows: Tensor, index: Tensor, num_out: int) -> Tensor:
    """``y[t] = sum of rows[r] with index[r] == t``: [num_out, H] in the rows' dtype, zero where there is none.

    ``rows`` [R, H], ``index`` [R] int64 in ``[0, num_out)``. Added in row order in fp32, rounded once.
    """
    if _on_gpu(rows):
        from xpar.kernels.gpu import rows as gpu

        return gpu.sum_rows(rows, index, num_out)
    if not rows.shape[0]:
        return rows.new_zeros(num_out, rows.shape[1])
    order = torch.sort(index, stable=True).indices
    return _bags(rows, order, torch.bincount(index, minlength=num_out))


def sum_runs(rows: Tensor, index: Tensor, sizes: Tensor) -> Tensor:
    """``y[t]`` = sum of the next ``sizes[t]`` rows that ``index`` names: [len(sizes), H] in the rows' dtype.

    ``rows`` [R, H], ``index`` [sum(sizes)] int64, ``sizes`` [T] int64. Added in that order in fp32, rounded once.
    """
    if _on_gpu(rows):
        from xpar.kernels.gpu import rows as gpu

        return gpu.sum_runs(rows, index, sizes)
    if not index.numel():
        return rows.new_zeros(sizes.shape[0], rows.shape[1])
    return _bags(rows, index, sizes)


def sum_into(out: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """``out[index[r]] += rows[r]`` in row order; ``out`` [T, H] float32, ``rows`` [R, H], ``index`` [R] int64.

    For sums that continue across several calls. One call's rows alone are summed faster by :func:`sum_rows`.
    """
    for first in range(0, rows.shape[0], 256):  # the fp32 copy of 256 rows stays in cache
        chunk = slice(first, first + 256)
        out.index_add_(0, index[chunk], rows[chunk].to(out.dtype))
    return out


def _on_gpu(rows: Tensor) -> bool:
    """Whether ``rows`` is for the kernels of :mod:`xpar.kernels.gpu.rows`, imported only then: they need Triton."""
    return rows.is_cuda and rows.dtype in GPU_DTYPES


def _split(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """[M, k] float32 -> [M, k, n] of ``dtype`` whose sum over n is the weight."""
    addends, rest = [], weights.float()
    for _ in range(_ADDENDS[dtype]):
        addends.append(rest.to(dtype))
        rest = rest - addends[-1].float()
    return torch.stack(addends, dim=-1)


def _bags(rows: Tensor, index: Tensor, sizes: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum consecutive runs of ``rows[index]``, run m being ``sizes[m]`` long."""
    offsets = functional.pad(sizes.cumsum(0), (1, 0))
    return functional.embedding_bag(
        index, rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )

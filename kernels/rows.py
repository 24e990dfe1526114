"""Moving and adding rows: groups by expert, gathers, and sums in order, rounded once.

Sums use torch's ``embedding_bag``: it reads each row once, in the order given, and accumulates in float32.
Its weights must have the rows' own dtype, so a float32 router weight is passed as a few addends of that dtype
whose sum is the weight (three bfloat16 hold all 24 bits of it; two float16 hold it to 2^-25), and no float32
copy of the rows is made. Rows on a GPU are moved and summed by :mod:`xpar.kernels.gpu.rows`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from xpar.kernels.contracts import ExpertInput
from xpar.kernels.cpu import row_library
from xpar.kernels.quantised_rows import decode_rows, quantise_to_words
from xpar.kernels.row_format import RowFormat

# Numbers of the dtype whose sum holds a float32 significand.
_ADDENDS = {torch.bfloat16: 3, torch.float16: 2, torch.float32: 1, torch.float64: 1}
# Dtypes that the Triton kernels move and sum; other rows on a GPU are left to torch.
GPU_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class ExpertGroups:
    """The active slots in expert order; slots of one expert keep their (entry, slot) order.

    Attributes:
        entry: [S] int64, the entry of each sorted slot.
        positions: [M, k] int64, the place of each slot among the sorted ones, -1 for an inactive slot.
        counts: number of slots of each expert.
    """

    entry: Tensor
    positions: Tensor
    counts: tuple[int, ...]

    def spans(self) -> list[tuple[int, int, int]]:
        """Return (expert, first, end) of every expert with slots, as ranges of sorted slots."""
        spans, first = [], 0
        for expert, count in enumerate(self.counts):
            if count:
                spans.append((expert, first, first + count))
            first += count
        return spans


def group_by_expert(topk_ids: Tensor, num_experts: int) -> ExpertGroups:
    """Group the active slots of ``topk_ids`` [M, k] by expert.

    Raises ValueError for an id of ``num_experts`` or more; -1 marks an inactive slot.

    Example:
        >>> group_by_expert(torch.tensor([[1, 0], [-1, 1]]), num_experts=2).spans()
        [(0, 0, 1), (1, 1, 3)]
    """
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
    return ExpertGroups(entry, positions.view(topk_ids.shape), tuple(counts[1:]))


def gather_rows(x: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``x[index]`` of [N, H] and [M] int64, in ``out`` [M, H] if that is given."""
    if _has_gpu_kernel(x) or (x.is_cuda and x.dtype == torch.int32):
        from xpar.kernels.gpu import rows as gpu

        return gpu.gather_rows(x, index, out)
    return torch.index_select(x, 0, index) if out is None else torch.index_select(x, 0, index, out=out)


def encode_rows(x: Tensor, form: RowFormat) -> Tensor:
    """Return ``x`` [N, H] as words [N, W] in ``form``: codes and scales, quantised row by row."""
    if _has_gpu_kernel(x):
        from xpar.kernels.gpu import coded_rows

        return coded_rows.encode_rows(x, form, has_dot8=_has_dot8(x.device))
    if _has_compiled_codes(x.device, x.dtype):
        return row_library.encode_rows(x, form)
    return quantise_to_words(x, form)


def decoded(x: ExpertInput, dtype: torch.dtype) -> ExpertInput:
    """Return ``x`` with rows in ``dtype``, for kernels that take no codes; ``x`` itself if it has none."""
    form, words = x.row_format, x.hidden_states
    if form is None:
        return x
    if words.is_cuda and dtype in GPU_DTYPES:
        from xpar.kernels.gpu import coded_rows

        rows = coded_rows.decode_rows(words, x.rows, form, dtype, has_dot8=_has_dot8(words.device))
    elif _has_compiled_codes(words.device, dtype):
        rows = row_library.decode_rows(words, x.rows, form)
    else:
        rows = decode_rows(words if x.rows is None else gather_rows(words, x.rows), form).to(dtype)
    return replace(x, hidden_states=rows, rows=None, row_format=None)


def _has_dot8(device: torch.device) -> bool:
    """Return whether a GPU converts e4m3."""
    from xpar.kernels.gpu.code_tables import has_dot8
    from xpar.kernels.gpu.tile_tables import Machine

    return has_dot8(Machine.of(device))


def _has_compiled_codes(device: torch.device, dtype: torch.dtype) -> bool:
    is_host = device.type == "cpu" and dtype == torch.bfloat16
    return is_host and row_library.instruction_set() is not None


def active_rows(rows: Tensor, positions: Tensor) -> Tensor:
    """Return the rows at the positions that are not -1, in (entry, slot) order: [S, H]."""
    flat = positions.reshape(-1)
    return rows.index_select(0, flat[flat >= 0])


def weighted_sum(slot_rows: Tensor, weights: Tensor, positions: Tensor, out: Tensor | None = None) -> Tensor:
    """Return each entry's ``sum_j weights[m, j] * slot_rows[positions[m, j]]``.

    Args:
        slot_rows: [S, H].
        weights: [M, k] float32.
        positions: [M, k] int64; -1 for no row, whose weight is not read.
        out: [M, H] in the dtype of ``slot_rows`` for the result, or None.

    Returns:
        [M, H] in the dtype of ``slot_rows``, added in slot order in float32 and rounded once. The bits of a
        row do not depend on the other rows.

    Example:
        >>> rows = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
        >>> weighted_sum(rows, torch.tensor([[0.5, 2.0]]), torch.tensor([[1, -1]]))
        tensor([[ 5., 10.]])
    """
    if _has_gpu_kernel(slot_rows):
        from xpar.kernels.gpu import rows as gpu

        return gpu.weighted_sum(slot_rows, weights, positions, out)
    if not slot_rows.shape[0] or not positions.numel():
        total = slot_rows.new_zeros(positions.shape[0], slot_rows.shape[1])
        return total if out is None else out.copy_(total)
    addends = _split_weights(weights, slot_rows.dtype)
    n = addends.shape[-1]
    active = positions >= 0
    if bool(active.all()):
        index = positions[..., None].expand(-1, -1, n).reshape(positions.shape[0], -1)
        total = functional.embedding_bag(
            index, slot_rows, mode="sum", per_sample_weights=addends.reshape(index.shape)
        )
    else:
        index = positions[active][:, None].expand(-1, n).reshape(-1)
        total = _sum_consecutive(slot_rows, index, active.sum(1) * n, addends[active].reshape(-1))
    return total if out is None else out.copy_(total)


def sum_rows(rows: Tensor, index: Tensor, num_out: int) -> Tensor:
    """Return ``y[t]``, the sum of the rows r [N, H] with ``index[r] == t``: [num_out, H].

    ``index`` [N] int64 is 0 to ``num_out`` - 1. Added in row order in float32 and rounded once; zero for no
    row.
    """
    if _has_gpu_kernel(rows):
        from xpar.kernels.gpu import rows as gpu

        return gpu.sum_rows(rows, index, num_out)
    if not rows.shape[0]:
        return rows.new_zeros(num_out, rows.shape[1])
    order = torch.sort(index, stable=True).indices
    return _sum_consecutive(rows, order, torch.bincount(index, minlength=num_out))


def sum_runs(rows: Tensor, index: Tensor, sizes: Tensor) -> Tensor:
    """Return ``y[t]``, the sum of the next ``sizes[t]`` rows that ``index`` names: [M, H].

    ``index`` is [sum(sizes)] int64, ``sizes`` [M] int64. Added in that order in float32 and rounded once.
    """
    if _has_gpu_kernel(rows):
        from xpar.kernels.gpu import rows as gpu

        return gpu.sum_runs(rows, index, sizes)
    if not index.numel():
        return rows.new_zeros(sizes.shape[0], rows.shape[1])
    return _sum_consecutive(rows, index, sizes)


def _has_gpu_kernel(rows: Tensor) -> bool:
    """Return whether :mod:`xpar.kernels.gpu.rows`, which needs Triton, serves ``rows``."""
    return rows.is_cuda and rows.dtype in GPU_DTYPES


def _split_weights(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Split ``weights`` [M, k] into addends [M, k, n] of ``dtype`` whose sum is the weight."""
    addends, rest = [], weights.float()
    for _ in range(_ADDENDS[dtype]):
        addends.append(rest.to(dtype))
        rest = rest - addends[-1].float()
    return torch.stack(addends, dim=-1)


def _sum_consecutive(rows: Tensor, index: Tensor, sizes: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum runs of ``rows[index]``, run m of ``sizes[m]`` rows, weighted if ``weights`` is given."""
    offsets = functional.pad(sizes.cumsum(0), (1, 0))
    return functional.embedding_bag(
        index, rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )

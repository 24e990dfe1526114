"""Weights in floats from codes and scales, some rows at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

from xpar.kernels.quantised_weight import CodeType, QuantisedWeight

SCRATCH_BYTES = 8 * 2**20
"""Bytes of the float32 rows that are made at a time; they stay in a processor's caches, nearly."""


def dequantise_into(weight: QuantisedWeight, out: Tensor) -> None:
    """Write W [N, K] into ``out`` in its dtype, with one rounding; the same as ``weight.dequantise()``.

    Few rows are in memory in float32 at a time.
    """
    rows, cols = weight.shape
    height = weight.format.block[0]
    step = max(1, SCRATCH_BYTES // (4 * max(1, cols)))
    if height > 1:
        step = -(-step // height) * height
    pairs = _pair_table(weight.format.code) if weight.format.code.is_nibble else None
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        codes = weight.codes[begin:end]
        values = codes.float() if pairs is None else _look_up(codes, pairs, cols)
        if weight.zeros is not None:
            _combine(Tensor.sub_, values, _zero_values(weight), weight.format.block, begin)
        _combine(Tensor.mul_, values, weight.scales, weight.format.block, begin)
        if weight.global_scale is not None:
            values *= weight.global_scale
        out[begin:end].copy_(values)


def _zero_values(weight: QuantisedWeight) -> Tensor:
    assert weight.zeros is not None
    if not weight.format.code.is_nibble:
        return weight.zeros
    return weight.format.code.values()[(weight.zeros & 15).long()]


def _pair_table(code: CodeType) -> Tensor:
    """Return the two values of every byte of nibbles, as [256] float64 that hold two float32."""
    values = code.values()
    byte = torch.arange(256)
    return torch.stack([values[byte & 15], values[byte >> 4]], -1).contiguous().view(torch.float64).view(-1)


def _look_up(codes: Tensor, pairs: Tensor, cols: int) -> Tensor:
    found = torch.index_select(pairs, 0, codes.reshape(-1).int())
    return found.view(torch.float32).view(codes.shape[0], -1)[:, :cols]


def _combine(
    operation: Callable[[Tensor, Tensor], Tensor],
    values: Tensor,
    by_block: Tensor,
    block: tuple[int, int],
    begin: int,
) -> None:
    """Combine rows ``values`` [n, K] from row ``begin`` on with one number a block, in place."""
    rows, cols = values.shape
    height, width = block
    if height == 0:
        factors = by_block.float().expand(rows, -1)
    elif height == 1:
        factors = by_block[begin : begin + rows].float()
    else:
        first = begin // height
        factors = by_block[first : -(-(begin + rows) // height)].float()
        factors = factors.repeat_interleave(height, 0)[begin - first * height :][:rows]
    width = width or cols
    full = cols // width
    if full:
        # A view, also of rows whose last column is cut off.
        blocks = values.as_strided((rows, full, width), (values.stride(0), width, 1))
        operation(blocks, factors[:, :full, None])
    if full * width < cols:
        operation(values[:, full * width :], factors[:, full:])

"""Quantisation of plain weights: round to nearest, with scales that fit the largest value of each block."""

import torch
from torch import Tensor
from torch.nn import functional

from xpar.kernels.quantised_weight import CodeType, QuantisedWeight, WeightFormat, join_nibbles, spread_blocks

NAMED_FORMATS = {
    "fp8": WeightFormat(CodeType.E4M3, (128, 128), torch.float32),
    "int8": WeightFormat(CodeType.INT8, (1, 0), torch.bfloat16),
    "int4": WeightFormat(CodeType.INT4, (1, 128), torch.bfloat16),
    "mxfp4": WeightFormat(CodeType.E2M1, (1, 32), torch.float8_e8m0fnu),
    "nvfp4": WeightFormat(CodeType.E2M1, (1, 16), torch.float8_e4m3fn, global_scale=True),
}
"""The formats that weights are quantised to, by the names that options have for them."""
_SMALLEST = 2.0**-126
# The largest code, and half of the step that would follow it.
_REACH = {CodeType.E2M1: 7.0, CodeType.E4M3: 464.0, CodeType.INT4: 7.5, CodeType.INT8: 127.5}


def quantise(weight: Tensor, fmt: WeightFormat) -> QuantisedWeight:
    """Quantise ``weight`` [N, K] or [E, N, K] to ``fmt``, each value to the nearest that its scale allows.

    The scale of a block lets its largest value be a code, and is always above 0. One that must be a power of
    two is the least from which the largest value is at most half a step away (7 / 6 of the largest code of
    e2m1). Of all powers it leaves the smallest error: of Gaussian weights 0.112 in MXFP4, where rounding up
    leaves 0.116, and the exponent of the largest value less 2 leaves 0.115. Ties go to the even code.

    Raises:
        ValueError: a value is not finite.

    Example:
        >>> weight = torch.tensor([[0.0, 1.0, -2.0, 7.0]])
        >>> quantise(weight, WeightFormat(CodeType.INT4, (1, 0), torch.float32)).dequantise()
        tensor([[ 0.,  1., -2.,  7.]])
    """
    values = weight.float()
    if not bool(values.isfinite().all()):
        raise ValueError(f"weights of shape {tuple(weight.shape)} have values that are not finite")
    if fmt.zero_point:
        return _with_zero_points(values, fmt)
    largest, factor = fmt.code.largest, None
    ranges = _reduce_blocks(values.abs(), fmt, "amax", 0.0)
    if fmt.global_scale:
        # The largest scale is then the largest number of the scales' dtype.
        factor = (ranges.amax((-2, -1)) / largest / torch.finfo(fmt.scale).max).clamp_min(_SMALLEST)
        ranges = ranges / factor[..., None, None]
    scales = _as_scales(ranges, fmt)
    grid = scales.float() if factor is None else scales.float() * factor[..., None, None]
    ratio = values / spread_blocks(grid, fmt, *values.shape[-2:])
    codes = _encode(ratio.clamp_(-largest, largest), fmt.code)
    return QuantisedWeight(fmt, codes, scales, weight.shape[-1], None, factor)


def _with_zero_points(values: Tensor, fmt: WeightFormat) -> QuantisedWeight:
    """Quantise to codes whose range is that of each block's values and 0."""
    rows, cols = values.shape[-2:]
    low = _reduce_blocks(values, fmt, "amin", float("inf")).clamp_max(0)
    high = _reduce_blocks(values, fmt, "amax", float("-inf")).clamp_min(0)
    levels = 2 * fmt.code.largest + 1
    scales = _above_zero((high - low) / levels, fmt.scale)
    zeros = (-low / scales.float()).round().clamp(0, levels)
    steps = (values / spread_blocks(scales.float(), fmt, rows, cols)).round()
    codes = (steps + spread_blocks(zeros, fmt, rows, cols)).clamp(0, levels)
    is_nibble, offset = fmt.code.is_nibble, 0 if fmt.code.is_nibble else 128
    dtype = fmt.code.dtype
    packed = join_nibbles(codes.to(torch.uint8)) if is_nibble else (codes - offset).to(dtype)
    return QuantisedWeight(fmt, packed, scales, cols, (zeros - offset).to(dtype))


def _reduce_blocks(values: Tensor, fmt: WeightFormat, operation: str, fill: float) -> Tensor:
    """Reduce each block by ``operation``: [.., blocks of N, blocks of K]."""
    rows, cols = values.shape[-2:]
    block_rows, block_cols = fmt.block[0] or rows, fmt.block[1] or cols
    padded = functional.pad(values, (0, -cols % block_cols, 0, -rows % block_rows), value=fill)
    shape = (*padded.shape[:-2], -1, block_rows, padded.shape[-1] // block_cols, block_cols)
    reduced: Tensor = getattr(padded.view(shape), operation)((-3, -1))
    return reduced


def _as_scales(ranges: Tensor, fmt: WeightFormat) -> Tensor:
    """Return the scales of blocks whose largest magnitudes are ``ranges``."""
    if fmt.scale == torch.float8_e8m0fnu:
        exponents = torch.log2((ranges / _REACH[fmt.code]).clamp_min(_SMALLEST)).ceil()
        return torch.exp2(exponents.clamp(-126, 127)).to(fmt.scale)
    return _above_zero(ranges / fmt.code.largest, fmt.scale)


def _above_zero(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Round scales to ``dtype``; those of zeros become its smallest normal number, as files need."""
    rounded = scales.to(dtype).float()
    return torch.where(rounded > 0, rounded, torch.finfo(dtype).smallest_normal).to(dtype)


def _encode(ratio: Tensor, code: CodeType) -> Tensor:
    """Return the codes nearest to ``ratio`` [.., N, K]; ties go to the even code."""
    if code is CodeType.E4M3:
        return ratio.to(torch.float8_e4m3fn)
    if code is CodeType.INT8:
        return ratio.round().to(torch.int8)
    if code is CodeType.INT4:
        return join_nibbles((ratio.round() + 8).to(torch.uint8))
    # e2m1 has steps of 0.5 up to 2, of 1 up to 4 and of 2 up to 6, and a code for each step.
    size = ratio.abs()
    above = torch.where(size < 4, size.round() + 2, (size / 2).round() + 4)
    nibbles = torch.where(size < 2, (2 * size).round(), above).to(torch.uint8)
    nibbles |= (ratio < 0).to(torch.uint8) << 3
    return join_nibbles(nibbles)

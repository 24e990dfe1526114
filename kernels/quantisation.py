"""Quantisation of plain weights: round to nearest, with scales that fit the largest value of each block."""

import torch
from torch import Tensor
from torch.nn import functional

from xpar.kernels.quantised_weight import CodeType, QuantisedWeight, WeightFormat, join_nibbles, spread_blocks

NAMED_FORMATS = {
    "fp8": WeightFormat(CodeType.E4M3, (128, 128), torch.float32),
    "int8": WeightFormat(CodeType.INT8, (1, 128), torch.bfloat16),
    "int4": WeightFormat(CodeType.INT4, (1, 128), torch.bfloat16),
    "mxfp4": WeightFormat(CodeType.E2M1, (1, 32), torch.float8_e8m0fnu),
    "nvfp4": WeightFormat(CodeType.E2M1, (1, 16), torch.float8_e4m3fn, global_scale=True),
}
"""The formats that weights are quantised to, by the names that options have for them."""
_SMALLEST = 2.0**-126


def quantise(weight: Tensor, fmt: WeightFormat) -> QuantisedWeight:
    """Quantise ``weight`` [N, K] or [E, N, K] to ``fmt``, each value to the nearest that its scale allows.

    Raises:
        ValueError: ``fmt`` has zero points, or a value is not finite.

    Example:
        >>> weight = torch.tensor([[0.0, 1.0, -2.0, 7.0]])
        >>> quantise(weight, WeightFormat(CodeType.INT4, (1, 0), torch.float32)).dequantise()
        tensor([[ 0.,  1., -2.,  7.]])
    """
    if fmt.zero_point:
        raise ValueError(f"{fmt}: weights are quantised without zero points; choose a symmetric format")
    values = weight.float()
    if not bool(values.isfinite().all()):
        raise ValueError(f"weights of shape {tuple(weight.shape)} have values that are not finite")
    largest, factor = fmt.code.largest, None
    wanted = _block_maxima(values, fmt) / largest
    if fmt.global_scale:
        # The largest scale is then the largest number of the scales' dtype.
        factor = (wanted.amax((-2, -1)) / torch.finfo(fmt.scale).max).clamp_min(_SMALLEST)
        wanted = wanted / factor[..., None, None]
    scales = _round_scales(wanted, fmt.scale)
    grid = scales.float() if factor is None else scales.float() * factor[..., None, None]
    ratio = values / spread_blocks(grid.clamp_min(_SMALLEST), fmt, *values.shape[-2:])
    codes = _encode(ratio.clamp(-largest, largest), fmt.code)
    return QuantisedWeight(fmt, codes, scales, weight.shape[-1], None, factor)


def relative_error(weight: Tensor, quantised: QuantisedWeight) -> float:
    """Return ||dequantised - weight|| / ||weight||, 0 for a weight of zeros."""
    difference = quantised.dequantise() - weight.float()
    return float(difference.norm() / weight.float().norm().clamp_min(_SMALLEST))


def _block_maxima(values: Tensor, fmt: WeightFormat) -> Tensor:
    """Return the largest magnitude of each block: [.., blocks of N, blocks of K]."""
    rows, cols = values.shape[-2:]
    block_rows, block_cols = fmt.block[0] or rows, fmt.block[1] or cols
    padded = functional.pad(values.abs(), (0, -cols % block_cols, 0, -rows % block_rows))
    shape = (*padded.shape[:-2], -1, block_rows, padded.shape[-1] // block_cols, block_cols)
    return padded.view(shape).amax((-3, -1))


def _round_scales(wanted: Tensor, dtype: torch.dtype) -> Tensor:
    """Round scales to ``dtype``: powers of two upwards, so that nothing is cut off, others to the nearest."""
    if dtype == torch.float8_e8m0fnu:
        exponents = torch.log2(wanted.clamp_min(_SMALLEST)).ceil()
        return torch.exp2(exponents).to(dtype)
    return wanted.to(dtype)


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

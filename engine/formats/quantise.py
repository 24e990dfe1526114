"""Codes and scales of a float weight: round to nearest, with the largest value of a block as its range."""

import torch
from torch import Tensor

from xpar.kernels.quantised_weight import CodeType, QuantisedWeight, WeightFormat, join_nibbles, spread_blocks

E2M1_BORDERS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""The values halfway between two neighbouring magnitudes of e2m1."""
LEAST = 1e-12
"""The least factor or power of two, of a weight or a block of zeros."""


def quantise(weight: Tensor, form: WeightFormat) -> QuantisedWeight:
    """Quantise a weight [N, K] in floats.

    A power of two as scale (e8m0) is the largest that leaves no value above the range of the code by more
    than its rounding, as MXFP4 is defined.
    """
    values = weight.float()
    rows, cols = values.shape
    low, high = _extremes(values, form.block)
    factor, zeros = None, None
    if form.zero_point:
        levels = 15.0 if form.code is CodeType.INT4 else 255.0
        scales = _as_scales((high.clamp_min(0) - low.clamp_max(0)) / levels, form.scale)
        zeros = (-low.clamp_max(0) / scales.float()).round().clamp(0, levels)
        steps = spread_blocks(scales.float(), form, rows, cols)
        codes = (values / steps).round() + spread_blocks(zeros, form, rows, cols)
        packed, zeros = _store(codes.clamp(0, levels), form.code), _store_bytes(zeros, form.code)
        return QuantisedWeight(form, packed, scales, cols, zeros)
    ranges = torch.maximum(high, -low) / form.code.largest
    if form.global_scale:
        factor = (ranges.max().clamp_min(LEAST) / CodeType.E4M3.largest).reshape(())
        ranges = ranges / factor
    scales = _as_scales(ranges, form.scale)
    step = spread_blocks(scales.float(), form, rows, cols) * (1.0 if factor is None else factor)
    return QuantisedWeight(form, _encode(values / step, form.code), scales, cols, None, factor)


def _extremes(values: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the least and the largest value of every block."""
    rows, cols = values.shape
    height, width = block[0] or rows, block[1] or cols
    down, right = -rows % height, -cols % width

    def reduce(fill: float, take: str) -> Tensor:
        padded = torch.nn.functional.pad(values, (0, right, 0, down), value=fill)
        blocks = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)
        reduced: Tensor = getattr(blocks, take)(dim=(1, 3))
        return reduced

    return reduce(float("inf"), "amin"), reduce(float("-inf"), "amax")


def _as_scales(ranges: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``ranges`` in the dtype of scales, which are above 0 also where all values are 0."""
    if dtype == torch.float8_e8m0fnu:
        return _power_of_two(ranges.clamp_min(LEAST))
    scales = ranges.to(dtype).float()
    return torch.where(scales > 0, scales, torch.finfo(dtype).smallest_normal).to(dtype)


def _power_of_two(ranges: Tensor) -> Tensor:
    """Return the scales of MXFP4: the exponent of the largest value, less that of 6."""
    exponent = torch.floor(torch.log2(ranges * CodeType.E2M1.largest)) - 2
    return (exponent.clamp(-127, 127) + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


def _encode(scaled: Tensor, code: CodeType) -> Tensor:
    """Return the nearest codes to ``scaled`` [N, K]."""
    if code is CodeType.E4M3:
        return scaled.clamp(-448, 448).to(torch.float8_e4m3fn)
    if code is CodeType.E2M1:
        magnitude = torch.bucketize(scaled.abs().contiguous(), torch.tensor(E2M1_BORDERS))
        return join_nibbles((magnitude + 8 * (scaled < 0)).to(torch.uint8))
    limit = int(code.largest) + 1
    return _store(scaled.round().clamp(-limit, limit - 1) + limit, code)


def _store(offset: Tensor, code: CodeType) -> Tensor:
    """Return canonical codes of whole numbers from 0 on."""
    return join_nibbles(offset.to(torch.uint8)) if code is CodeType.INT4 else _store_bytes(offset, code)


def _store_bytes(offset: Tensor, code: CodeType) -> Tensor:
    """Return one canonical code a byte of whole numbers from 0 on."""
    byte = offset.to(torch.uint8)
    return byte if code is CodeType.INT4 else (byte ^ 0x80).view(torch.int8)

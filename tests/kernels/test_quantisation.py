"""Weights are quantised to the nearest value that a block's scale allows."""

import pytest
import torch
from quantised_weights import FORMATS

from xpar.kernels.quantisation import NAMED_FORMATS, quantise, relative_error
from xpar.kernels.quantised_weight import CodeType, WeightFormat, decode, spread_blocks

SYMMETRIC = [fmt for fmt in FORMATS if not fmt.zero_point]
# rms errors of Gaussian weights: what the number of values and the scales leave.
EXPECTED = {"fp8": 0.0265, "int8": 0.0065, "int4": 0.118, "mxfp4": 0.115, "nvfp4": 0.095}


def all_values(fmt: WeightFormat) -> torch.Tensor:
    """Every value of a code but NaN, ascending; -8 of int4 and -128 of int8 are not used."""
    if fmt.code.is_nibble:
        values = fmt.code.values()
        return (values[1:] if fmt.code is CodeType.INT4 else values).unique()
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes & 127 != 127] if fmt.code is CodeType.E4M3 else codes[codes != 128]
    return decode(codes.view(fmt.code.dtype), fmt.code, len(codes)).unique()


@pytest.mark.parametrize("fmt", SYMMETRIC, ids=str)
@pytest.mark.parametrize("shape", [(5, 33), (130, 129), (3, 64, 40)], ids=str)
def test_each_value_is_the_nearest_that_its_scale_allows(fmt, shape, fresh_seed):
    g = torch.Generator().manual_seed(fresh_seed)
    weight = torch.randn(shape, generator=g) * torch.rand(shape[-1], generator=g)
    found = quantise(weight, fmt)
    assert found.shape == tuple(shape)
    scales = spread_blocks(found.scales.float(), found.format, *found.shape[-2:])
    if found.global_scale is not None:
        scales = scales * found.global_scale[..., None, None]
    allowed = all_values(fmt)
    ratio = weight / scales
    # A block's largest value may lie beyond the last one where its scale was rounded down.
    distance = (ratio.clamp(allowed[0], allowed[-1])[..., None] - allowed).abs().amin(-1)
    assert torch.allclose(
        (found.dequantise() / scales - ratio.clamp(allowed[0], allowed[-1])).abs(), distance, atol=1e-4
    )
    assert bool((ratio.abs() <= allowed[-1] * 1.07).all())


@pytest.mark.parametrize("name", NAMED_FORMATS)
def test_the_error_of_gaussian_weights_is_that_of_the_format(name, fresh_seed):
    g = torch.Generator().manual_seed(fresh_seed)
    weight = torch.randn(256, 512, generator=g)
    error = relative_error(weight, quantise(weight, NAMED_FORMATS[name]))
    assert error == pytest.approx(EXPECTED[name], rel=0.08)


@pytest.mark.parametrize("fmt", SYMMETRIC, ids=str)
def test_zeros_stay_zeros(fmt):
    assert bool((quantise(torch.zeros(40, 70), fmt).dequantise() == 0).all())


def test_what_cannot_be_quantised_is_refused():
    with pytest.raises(ValueError, match="int4 1x16 with zero points: weights are quantised without"):
        quantise(torch.ones(4, 16), FORMATS[5])
    with pytest.raises(ValueError, match=r"shape \(2, 16\) have values that are not finite"):
        quantise(torch.full((2, 16), float("nan")), FORMATS[0])

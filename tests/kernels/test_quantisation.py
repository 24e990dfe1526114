"""Weights are quantised to the nearest value that a block's scale allows."""

import pytest
import torch
from quantised_weights import FORMATS

from xpar.engine.layer.reference import relative_error
from xpar.kernels.quantisation import NAMED_FORMATS, quantise
from xpar.kernels.quantised_weight import CodeType, WeightFormat, decode, spread_blocks

SYMMETRIC = [fmt for fmt in FORMATS if not fmt.zero_point]
# rms errors of Gaussian weights: what the number of values and the scales leave.
EXPECTED = {"fp8": 0.0265, "int8": 0.0077, "int4": 0.118, "mxfp4": 0.112, "nvfp4": 0.095}


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
    # A block's largest value may lie beyond the last one where its scale was rounded down, a power of two by
    # up to half a step of the code.
    most = 7 / 6 if fmt.scale == torch.float8_e8m0fnu and fmt.code is CodeType.E2M1 else 1.07
    distance = (ratio.clamp(allowed[0], allowed[-1])[..., None] - allowed).abs().amin(-1)
    assert torch.allclose(
        (found.dequantise() / scales - ratio.clamp(allowed[0], allowed[-1])).abs(), distance, atol=1e-4
    )
    assert bool((ratio.abs() <= allowed[-1] * most * 1.0001).all())


@pytest.mark.parametrize("name", NAMED_FORMATS)
def test_the_error_of_gaussian_weights_is_that_of_the_format(name, fresh_seed):
    g = torch.Generator().manual_seed(fresh_seed)
    weight = torch.randn(256, 512, generator=g)
    error = relative_error(quantise(weight, NAMED_FORMATS[name]).dequantise(), weight)
    assert error == pytest.approx(EXPECTED[name], rel=0.08)


@pytest.mark.parametrize("fmt", SYMMETRIC, ids=str)
def test_zeros_stay_zeros_and_have_scales_that_files_may_have(fmt):
    found = quantise(torch.zeros(40, 70), fmt)
    assert bool((found.dequantise() == 0).all()) and bool((found.scales.float() > 0).all())


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt.zero_point], ids=str)
def test_zero_points_leave_no_value_further_than_half_a_step(fmt, fresh_seed):
    weight = torch.rand(24, 128, generator=torch.Generator().manual_seed(fresh_seed)) + 3.0
    found = quantise(weight, fmt)
    step = spread_blocks(found.scales.float(), fmt, 24, 128)
    # The largest value of a block lies beyond the last code where its scale was rounded down.
    assert bool(((found.dequantise() - weight).abs() <= step * (0.51 + 256 * 2.0**-9)).all())
    assert relative_error(found.dequantise(), weight.float()) < (0.08 if fmt.code.is_nibble else 0.01)


def test_a_power_of_two_is_the_best_of_all(fresh_seed):
    """The other powers leave each block a larger error, or the same."""
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(fresh_seed))
    found = quantise(weight, NAMED_FORMATS["mxfp4"])
    errors = []
    for shift in (-1, 0, 1):
        scales = found.scales.float() * 2.0**shift
        allowed = all_values(found.format) * scales[..., None]
        errors.append((weight[..., None] - allowed).abs().amin(-1).square().sum())
    assert errors[1] < min(errors[0], errors[2])


def test_ties_go_to_the_even_code():
    halfway = torch.tensor(
        [[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -5.0, 0.0, 0.5, 1, 2, 3, 4] * 2]
    )
    expected = torch.tensor([[0.0, 1, 1, 2, 2, 4, 4, 6, 0, -4, 0, 0.5, 1, 2, 3, 4] * 2])
    assert torch.equal(quantise(halfway, NAMED_FORMATS["mxfp4"]).dequantise(), expected)


def test_what_cannot_be_quantised_is_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 16\) have values that are not finite"):
        quantise(torch.full((2, 16), float("nan")), FORMATS[0])

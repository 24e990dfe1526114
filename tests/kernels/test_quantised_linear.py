"""Dense products from codes and scales equal those of the dequantised weight."""

import pytest
import torch
from quantised_weights import FORMATS, draw

from xpar.kernels.cpu import quantised_library
from xpar.kernels.cpu.linear import QUANTISED, build_quantised_linear
from xpar.kernels.cpu.linear_native_quantised import NativeQuantisedLinear

REASON = quantised_library.why_unavailable()
needs_library = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@needs_library
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_products_equal_float64_ones(fmt, biased, g):
    weight = draw(fmt, 333, 200, g)
    bias = torch.randn(333, generator=g).bfloat16() if biased else None
    linear = build_quantised_linear(weight, bias, torch.bfloat16)
    assert isinstance(linear, NativeQuantisedLinear) and linear.nbytes() <= 1.3 * weight.nbytes + 4 * 384
    for rows in (0, 1, 3, 17, 70):
        x = torch.randn(rows, 200, generator=g).bfloat16()
        found = linear(x)
        assert found.shape == (rows, 333) and found.dtype == torch.bfloat16
        expected = x.double() @ weight.dequantise().double().T + (0 if bias is None else bias.double())
        assert float((found.double() - expected).norm()) <= 4e-3 * float(expected.norm())


def test_other_dtypes_and_names_get_converted_weights(g):
    weight = draw(FORMATS[0], 40, 64, g)
    x = torch.randn(3, 64, generator=g)
    expected = x @ weight.dequantise().T
    for name in ("auto", "plain"):
        linear = build_quantised_linear(weight, None, torch.float32, name)
        assert not isinstance(linear, NativeQuantisedLinear)
        torch.testing.assert_close(linear(x), expected, rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="e4m3 128x128 weights: multiplies rows in bfloat16, not in float32"):
        build_quantised_linear(weight, None, torch.float32, QUANTISED)

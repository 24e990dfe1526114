"""Gated activations against their formulas in float64."""

import pytest
import torch

from xpar.kernels.activations import gated

FORMULAS = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: x * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
}


@pytest.mark.parametrize("shape", [(0, 6), (5, 2), (3, 7, 64)], ids=str)
@pytest.mark.parametrize("activation", FORMULAS)
def test_gate_half_first(activation, shape, g):
    packed = torch.randn(shape, generator=g) * 3
    width = shape[-1] // 2
    exact = FORMULAS[activation](packed[..., :width].double()) * packed[..., width:].double()
    got = gated(packed, activation)
    assert got.is_contiguous() and got.shape == exact.shape
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


def test_refuses():
    with pytest.raises(ValueError, match="width 3"):
        gated(torch.zeros(1, 3), "silu")
    with pytest.raises(ValueError, match="'relu'"):
        gated(torch.zeros(1, 4), "relu")  # type: ignore[arg-type]

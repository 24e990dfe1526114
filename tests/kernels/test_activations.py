"""Activations against their formulas in float64."""

import math

import pytest
import torch

from xpar.kernels.activations import activate
from xpar.kernels.contracts import Activation

EVERY = [
    Activation("silu"),
    Activation("gelu"),
    Activation("gelu_tanh"),
    Activation("silu", limit=1.5),
    Activation("silu", limit=7.0, alpha=1.702, beta=1.0),
    Activation("silu", alpha=0.5, beta=-0.25),
    Activation("swiglustep", limit=0.75),
    Activation("situ", beta=2.0),
    Activation("situ", beta=1.5, limit=1.25),
    Activation("silu", gated=False),
    Activation("gelu", gated=False),
    Activation("gelu_tanh", gated=False),
    Activation("relu2", gated=False),
]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def formula(a: Activation, g: float, u: float) -> float:
    curve = {
        "silu": lambda x: x * sigmoid(x),
        "gelu": lambda x: x * 0.5 * (1 + math.erf(x / 2**0.5)),
        "gelu_tanh": lambda x: x * 0.5 * (1 + math.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))),
        "relu2": lambda x: max(x, 0.0) ** 2,
    }
    if not a.gated:
        return curve[a.name](g)
    bound = math.inf if a.limit is None else a.limit
    clamped = max(-bound, min(bound, u))
    if a.name == "silu":
        g = min(g, bound)
        return g * sigmoid(a.alpha * g) * (clamped + a.beta)
    if a.name == "swiglustep":
        return min(g * sigmoid(g), bound) * clamped
    if a.name == "situ":
        soft = u if a.limit is None else a.limit * math.tanh(u / a.limit)
        return a.beta * math.tanh(g / a.beta) * sigmoid(g) * soft
    return curve[a.name](g) * u


@pytest.mark.parametrize("shape", [(0, 6), (5, 2), (3, 7, 64)], ids=str)
@pytest.mark.parametrize("activation", EVERY, ids=str)
def test_equals_the_formula_gate_half_first(activation, shape, g):
    packed = torch.randn(shape, generator=g) * 3
    gate, up = packed.chunk(2, dim=-1) if activation.gated else (packed, packed)
    pairs = zip(gate.double().flatten().tolist(), up.double().flatten().tolist(), strict=True)
    exact = torch.tensor([formula(activation, x, y) for x, y in pairs], dtype=torch.float64).view(gate.shape)
    got = activate(packed, activation)
    assert got.is_contiguous() and got.shape == exact.shape and got.dtype == packed.dtype
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", EVERY, ids=str)
def test_input_is_unchanged(activation, g):
    packed = torch.randn(4, 8, generator=g)
    before = packed.clone()
    activate(packed, activation)
    assert torch.equal(packed, before)


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"name": "gelu", "limit": 7.0}, "only gated silu, swiglustep and situ have a limit"),
        ({"name": "silu", "gated": False, "alpha": 2.0}, "only gated silu"),
        ({"name": "silu", "limit": -1.0}, "limit=-1.0 must be positive"),
        ({"name": "relu2"}, "set gated=False"),
        ({"name": "situ", "gated": False}, "needs a gate"),
        ({"name": "swiglustep"}, "needs a limit"),
        ({"name": "situ"}, "needs beta > 0"),
    ],
    ids=lambda x: x["name"] if isinstance(x, dict) else "",
)
def test_refuses_parameters_that_no_formula_has(fields, message):
    with pytest.raises(ValueError, match=message):
        Activation(**fields)


def test_refuses_odd_rows():
    with pytest.raises(ValueError, match="width 3"):
        activate(torch.zeros(1, 3), Activation("silu"))

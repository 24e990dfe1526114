"""Expert kernels that compute from codes and scales against the reference with the dequantised weights."""

from dataclasses import replace

import pytest
import torch
from quantised_weights import FORMATS, draw

from xpar.kernels.contracts import Activation, ExpertInput, ExpertSpec
from xpar.kernels.quantised_weight import CodeType, WeightFormat
from xpar.kernels.reference import ReferenceExperts
from xpar.kernels.registry import KERNELS

ENTRY = next(entry for entry in KERNELS if entry.name == "native-quantised")
SPEC = ExpertSpec(6, 128, 96, torch.bfloat16, Activation("silu"), weight_format=FORMATS[0])
REASON = ENTRY.why_not(SPEC)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
ACTIVATIONS = [
    Activation("silu"),
    Activation("gelu_tanh"),
    Activation("silu", limit=7.0, alpha=1.702, beta=1.0),
    Activation("relu2", gated=False),
]
BAR = 6e-3
"""The relative error of a layer that computes from exact codes with bfloat16 rows and float32 sums."""


def build(spec, g):
    """Return the kernel and the reference with the same random weights, of outputs of order one."""
    kernels = ENTRY.build(spec), ReferenceExperts(spec)
    rows, h, i = (
        spec.activation.gate_up_rows(spec.intermediate_size),
        spec.hidden_size,
        spec.intermediate_size,
    )
    for expert in range(spec.num_experts):
        weights = []
        for shape in ((rows, h), (h, i)):
            weight = draw(spec.weight_format, *shape, g)
            size = float(weight.dequantise().norm()) / shape[0] ** 0.5
            weights.append(replace(weight, scales=(weight.scales.float() / size).to(weight.format.scale)))
        biases = [torch.randn(n, generator=g).bfloat16() for n in (rows, h)] if spec.bias else []
        for kernel in kernels:
            kernel.load_quantised(expert, *weights, *biases)
    return kernels


def batch(spec, tokens, k, g, drop=0.0):
    topk_ids = torch.rand(tokens, spec.num_experts, generator=g).topk(k).indices.int()
    topk_ids[torch.rand(tokens, k, generator=g) < drop] = -1
    x = torch.randn(tokens, spec.hidden_size, generator=g).bfloat16()
    return ExpertInput(x, topk_ids, torch.rand(tokens, k, generator=g))


def assert_near(found, expected):
    error = float((found.float() - expected.float()).norm() / expected.float().norm())
    assert error <= BAR, f"relative error {error:.1e}"


@pytest.mark.parametrize("tokens", [1, 90])
@pytest.mark.parametrize("sizes", [(128, 96), (100, 33), (257, 40)], ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_layer_is_that_of_the_dequantised_weights(fmt, sizes, tokens, g):
    for activation, bias in ((ACTIVATIONS[0], False), (ACTIVATIONS[2], True)):
        spec = ExpertSpec(6, *sizes, torch.bfloat16, activation, bias=bias, weight_format=fmt)
        kernel, reference = build(spec, g)
        x = batch(spec, tokens, 3, g, drop=0.2 if tokens > 1 else 0.0)  # one token must keep a slot
        assert_near(kernel.compute(x), reference.compute(x))
        assert_near(kernel.compute_slots(x), reference.compute_slots(x))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_every_activation_and_bias(activation, bias, g):
    spec = replace(SPEC, activation=activation, bias=bias)
    kernel, reference = build(spec, g)
    x = batch(spec, 20, 2, g)
    assert_near(kernel.compute(x), reference.compute(x))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_bits_of_a_row_do_not_depend_on_the_batch(fmt, g):
    """Also where a batch has so many rows that codes are decoded before they are multiplied."""
    spec = replace(SPEC, num_experts=2, row_invariant=True, weight_format=fmt, bias=True)
    kernel, _ = build(spec, g)
    x = batch(spec, 200, 2, g)
    whole, slots = kernel.compute(x), kernel.compute_slots(x).view(200, 2, -1)
    for size in (1, 2, 3, 5, 7, 13, 49, 130):
        pick = torch.randperm(200, generator=g)[:size]
        part = ExpertInput(x.hidden_states, x.topk_ids[pick], x.topk_weights[pick], pick)
        assert torch.equal(kernel.compute(part), whole[pick])
        assert torch.equal(kernel.compute_slots(part).view(size, 2, -1), slots[pick])


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_memory_is_that_of_the_codes_and_scales(fmt, g):
    spec = replace(SPEC, hidden_size=512, intermediate_size=256, num_experts=2, weight_format=fmt)
    weights = [draw(fmt, 512, 512, g), draw(fmt, 512, 256, g)]
    # Scales of one byte are kept in two.
    assert ENTRY.build(spec).nbytes() <= 1.12 * 2 * sum(weight.nbytes for weight in weights)


def test_what_does_not_fit_is_refused(g):
    kernel, _ = build(SPEC, g)
    gate_up, down = draw(SPEC.weight_format, 192, 128, g), draw(SPEC.weight_format, 128, 96, g)
    with pytest.raises(
        ValueError, match="gate_up is in plain numbers, the kernel was built for e4m3 128x128"
    ):
        kernel.load_expert(0, gate_up.dequantise(), down.dequantise())
    with pytest.raises(ValueError, match="gate_up is in int4"):
        kernel.load_quantised(0, draw(FORMATS[4], 192, 128, g), down)
    gate_up.codes.view(torch.uint8)[3, 5] = 0xFF
    with pytest.raises(ValueError, match="expert 2: 1 of the e4m3 128x128 codes are NaN"):
        kernel.load_quantised(2, gate_up, down)
    with pytest.raises(RuntimeError, match="expert 1 has tokens but no weights"):
        ENTRY.build(SPEC).compute(
            ExpertInput(torch.zeros(1, 128).bfloat16(), torch.tensor([[1]]), torch.ones(1, 1))
        )


def test_why_a_spec_is_refused():
    assert ENTRY.why_not(replace(SPEC, weight_format=None)) == "computes from quantised weights alone"
    odd = WeightFormat(CodeType.INT8, (1, 20), torch.float32)
    assert "multiple of 8" in str(ENTRY.why_not(replace(SPEC, weight_format=odd)))
    double = WeightFormat(CodeType.INT8, (1, 32), torch.float64)
    assert "scales in float64" in str(ENTRY.why_not(replace(SPEC, weight_format=double)))

"""Products from codes and scales equal those of the dequantised weights, in every instruction set."""

import pytest
import torch
from quantised_weights import FORMATS, draw

from xpar.kernels.cpu import quantised_library
from xpar.kernels.cpu.quantised_library import SETS, PackedCodes

REASON = quantised_library.why_unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
HERE = range(1, 1 + (0 if REASON else quantised_library.instruction_set()))
every_set = pytest.mark.parametrize("instructions", HERE, ids=lambda number: SETS[number])
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)
SHAPES = [(1, 1), (16, 2), (31, 7), (33, 64), (100, 129), (515, 96), (130, 260)]


def uneven(experts, g):
    """Return spans of 1 to 40 rows for some of the experts, in any order."""
    spans, first = [], 0
    for expert in torch.randperm(experts, generator=g)[: experts // 2 + 1].tolist():
        count = int(torch.randint(1, 41, (1,), generator=g))
        spans.append((expert, first, first + count))
        first += count
    return spans


def pack(weights, instructions, biases=None):
    outputs, inputs = weights[0].shape
    packed = PackedCodes(len(weights), outputs, inputs, weights[0].format, biases is not None, instructions)
    for expert, weight in enumerate(weights):
        packed.load(expert, weight, None if biases is None else biases[expert])
    return packed


@every_set
@every_format
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_spans_equal_float64_ones(shape, has_bias, fmt, instructions, g):
    outputs, inputs = shape
    weights = [draw(fmt, outputs, inputs, g) for _ in range(5)]
    biases = torch.randn(5, outputs, generator=g).bfloat16() if has_bias else None
    spans = uneven(5, g)
    total = spans[-1][2]
    x = torch.randn(17, inputs, generator=g).bfloat16()
    rows = torch.randint(17, (total,), generator=g)
    found = pack(weights, instructions, biases).multiply(x, spans, rows)
    assert found.shape == (total, outputs)
    for expert, first, end in spans:
        values = weights[expert].dequantise().double()
        here = x[rows[first:end]].double()
        expected = here @ values.T + (0 if biases is None else biases[expert].double())
        # Rounded to bfloat16 once (2^-8), after sums in float32, whose terms may be larger than they.
        terms = here.abs() @ values.abs().T * (1 if fmt.zero_point is False else 4)
        assert bool(
            ((found[first:end].double() - expected).abs() <= expected.abs() / 256 + terms * 1e-6).all()
        )

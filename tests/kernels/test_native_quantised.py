"""Products from codes and scales equal those of the dequantised weights, in every instruction set."""

import pytest
import torch
from quantised_weights import FORMATS, draw

from xpar.kernels.cpu import quantised_library
from xpar.kernels.cpu.quantised_library import SETS, PackedCodes
from xpar.kernels.quantised_weight import CodeType, QuantisedWeight, WeightFormat

REASON = quantised_library.why_unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
HERE = range(1, 1 + (0 if REASON else quantised_library.instruction_set()))
every_set = pytest.mark.parametrize("instructions", HERE, ids=lambda number: SETS[number])
ALL_FORMATS = [*FORMATS, WeightFormat(CodeType.INT8, (0, 64), torch.float32, zero_point=True)]
every_format = pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
SHAPES = [(1, 1), (16, 2), (31, 7), (33, 64), (100, 129), (515, 96), (130, 260)]


def uneven(experts, g):
    """Return spans of 1 to 149 rows for some of the experts, in any order."""
    spans, first = [], 0
    for expert in torch.randperm(experts, generator=g)[: experts // 2 + 1].tolist():
        count = int(torch.randint(1, 150, (1,), generator=g))
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


def every_code(code):
    """Return a weight [256 or 64, 64] in which every code but NaN stands in every place of a word."""
    if code.is_nibble:
        n, byte = torch.meshgrid(torch.arange(64), torch.arange(32), indexing="ij")
        # Over 16 rows each nibble of a byte takes all values, and the two differ.
        codes = ((n + byte) % 16 | (n + 3 * byte + n // 16) % 16 << 4).to(torch.uint8)
    else:
        n, k = torch.meshgrid(torch.arange(256), torch.arange(64), indexing="ij")
        codes = ((n + 5 * k) % 256).to(torch.uint8)
    return codes.where(codes & 127 != 127, 0) if code is CodeType.E4M3 else codes


@every_set
@pytest.mark.parametrize("code", CodeType, ids=lambda code: code.value)
def test_every_code_in_every_place_is_exact(code, instructions):
    """A row with a single one yields a column of the weight; many rows are multiplied in another way."""
    codes = every_code(code)
    fmt = WeightFormat(code, (1, 16), torch.bfloat16)
    scales = torch.exp2(torch.arange(4.0)).expand(len(codes), 4).bfloat16()
    weight = QuantisedWeight(fmt, codes.view(code.dtype), scales.contiguous(), 64)
    assert len(weight.codes.view(torch.uint8).unique()) >= 254 or code.is_nibble
    packed, x = pack([weight], instructions), torch.eye(64).bfloat16()
    expected = weight.dequantise().T.bfloat16()
    many = x.repeat(3, 1)
    assert torch.equal(packed.multiply(many, [(0, 0, 192)]), expected.repeat(3, 1))
    for first in range(0, 64, 5):
        part = x[first : first + 5].contiguous()
        assert torch.equal(packed.multiply(part, [(0, 0, len(part))]), expected[first : first + 5])


@every_set
@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.float8_e4m3fn], ids=str)
def test_every_scale_of_a_byte_is_exact(dtype, instructions):
    """Scales of 2^-127, of 2^127, and e4m3 ones below the smallest normal one among them."""
    scales = torch.arange(255, dtype=torch.uint8)
    scales = scales.where(scales & 127 != 127, 0) if dtype == torch.float8_e4m3fn else scales
    codes = torch.tensor([[0x21, 0x43, 0x98, 0xF7]], dtype=torch.uint8).repeat(255, 4)
    fmt = WeightFormat(CodeType.E2M1, (1, 32), dtype)
    weight = QuantisedWeight(fmt, codes, scales.view(dtype)[:, None], 32)
    packed, x = pack([weight], instructions), torch.eye(32).bfloat16()
    expected = weight.dequantise().T.contiguous()
    assert torch.equal(packed.multiply(x, [(0, 0, 32)], dtype=torch.float32), expected)


@every_set
@every_format
def test_bits_are_those_of_a_row_alone(fmt, instructions, g):
    """For every number of rows in a tile and beyond, with panels that are filled in part."""
    for outputs in (5, 70):
        packed = pack([draw(fmt, outputs, 40, g)], instructions)
        x = torch.randn(135, 40, generator=g).bfloat16()
        single = torch.cat([packed.multiply(row[None], [(0, 0, 1)]) for row in x])
        for rows in (*range(2, 15), 49, 135):
            assert torch.equal(packed.multiply(x[:rows].contiguous(), [(0, 0, rows)]), single[:rows])


@every_set
def test_many_rows_go_by_several_calls(instructions, g):
    packed = pack([draw(FORMATS[5], 50, 30, g) for _ in range(4)], instructions)
    x = torch.randn(300, 30, generator=g).bfloat16()
    spans = [(2, 0, 7), (3, 7, 207), (0, 207, 300)]
    rows = torch.randperm(300, generator=g)
    assert torch.equal(packed.multiply(x, spans, rows, buffer_bytes=1), packed.multiply(x, spans, rows))


def test_what_does_not_fit_is_refused(g):
    packed = PackedCodes(1, 20, 40, FORMATS[0])
    with pytest.raises(ValueError, match=r"weight is int8 1x32 \(20, 40\), expected e4m3 128x128 \(20, 40\)"):
        packed.load(0, draw(FORMATS[3], 20, 40, g))
    packed.load(0, draw(FORMATS[0], 20, 40, g))
    for x in (torch.zeros(2, 40), torch.zeros(2, 39).bfloat16(), torch.zeros(40, 2).bfloat16().T):
        with pytest.raises(ValueError, match="expected contiguous bfloat16 rows of 40"):
            packed.multiply(x, [(0, 0, 2)])

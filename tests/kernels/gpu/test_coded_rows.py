"""Rows of words on the device against their definition, in the interpreter."""

from dataclasses import replace

import pytest
import torch
from coded_layers import AMPERE, HOPPER, Case, Layer, error, small_table

from xpar.kernels import quantised_rows
from xpar.kernels.gpu.coded_rows import decode_rows, encode_rows, split_words
from xpar.kernels.quantised_weight import ActivationScheme, CodeType, WeightFormat
from xpar.kernels.row_format import RowFormat

BLOCK = WeightFormat(CodeType.E4M3, (128, 128), torch.float32)
CHANNEL = WeightFormat(CodeType.E4M3, (1, 0), torch.bfloat16)
SCHEMES = [ActivationScheme(group, powers) for group in (0, 128) for powers in (False, True)]
DOT8 = pytest.mark.parametrize("has_dot8", [True, False], ids=["e4m3", "bits"])


def draw(m, h, g):
    x = torch.randn(m, h, generator=g) * torch.exp2(torch.randint(-20, 20, (m, 1), generator=g).float())
    x[0, :130] = 0.0
    return x.bfloat16()


def meaning(words, form):
    """The codes and scales of words, without what fills a row up."""
    return form.codes(words).view(torch.uint8), form.scales(words)


@DOT8
@pytest.mark.parametrize(("rows", "width"), [(0, 256), (3, 256), (3, 303), (70, 130)])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_words_are_those_of_the_definition(scheme, width, rows, has_dot8, g):
    form, x = RowFormat(width, scheme), draw(max(rows, 1), width, g)[:rows]
    found = meaning(encode_rows(x, form, has_dot8=has_dot8), form)
    expected = meaning(quantised_rows.quantise_to_words(x, form), form)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@DOT8
@pytest.mark.parametrize("width", [256, 303])
@pytest.mark.parametrize("group", [0, 128])
def test_words_come_apart_as_products_read_them(group, width, has_dot8, g):
    form = RowFormat(width, ActivationScheme(group))
    words = quantised_rows.quantise_to_words(draw(9, width, g), form)
    words.view(torch.uint8)[:, width : 4 * form.first_scale] = 0x7F  # NaN, in a filling that nobody writes
    for rows in (None, torch.randint(9, (13,), generator=g)):
        picked = words if rows is None else words[rows]
        codes, scales = split_words(words, rows, form, 384, has_dot8=has_dot8)
        assert torch.equal(codes[0, :, :width].view(torch.uint8), meaning(picked, form)[0])
        assert (codes[0, :, width:].view(torch.uint8) == 0).all()
        assert torch.equal(scales.T, form.scales(picked))


@DOT8
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("group", [0, 128])
def test_words_are_decoded(group, dtype, has_dot8, g):
    form = RowFormat(303, ActivationScheme(group))
    words, rows = quantised_rows.quantise_to_words(draw(9, 303, g), form), torch.tensor([8, 0, 8, 3])
    for index in (None, rows):
        picked = words if index is None else words[index]
        got = decode_rows(words, index, form, dtype, has_dot8=has_dot8)
        assert torch.equal(got, quantised_rows.decode_rows(picked, form).to(dtype))


TABLES = {
    "16 rows": small_table(16, True),
    "32 rows": small_table(32, False),
    "vector": replace(small_table(16, True), vector_tokens=99),
}


CASES = {
    "by 128": ("16 rows", BLOCK, SCHEMES[2], HOPPER),
    "by powers of two": ("32 rows", BLOCK, SCHEMES[3], HOPPER),
    "by token": ("32 rows", CHANNEL, SCHEMES[0], HOPPER),
    "decoded": ("16 rows", BLOCK, SCHEMES[2], AMPERE),
    "a few tokens": ("vector", BLOCK, SCHEMES[2], HOPPER),
}


@pytest.mark.parametrize(("table", "fmt", "scheme", "machine"), CASES.values(), ids=CASES)
def test_experts_of_words_have_the_bits_of_rows_quantised_there(fmt, scheme, machine, table, g):
    layer = Layer(Case(fmt, scheme, machine, hidden=200), g)
    kernel, form = layer.kernel(TABLES[table]), RowFormat(200, scheme)
    words = quantised_rows.quantise_to_words(layer.x.hidden_states, form)
    coded = replace(layer.x, hidden_states=words, row_format=form)
    got = kernel.compute(coded)
    if table == "vector":  # a few tokens are multiplied as they are, here as what arrived stands for
        plain = quantised_rows.decode_rows(words, form).bfloat16()
        assert torch.equal(got, kernel.compute(replace(layer.x, hidden_states=plain)))
    else:
        assert torch.equal(got, kernel.compute(layer.x))
        assert error(got, layer.emulated(scheme)) < 4e-3

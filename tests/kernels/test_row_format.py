"""Rows as words of codes and scales: the form, and the compiled code beside the definition."""

import pytest
import torch

from xpar.kernels.contracts import ExpertInput
from xpar.kernels.cpu import row_library
from xpar.kernels.quantised_rows import decode_rows, quantise_rows, quantise_to_words
from xpar.kernels.quantised_weight import ActivationScheme
from xpar.kernels.row_format import RowFormat
from xpar.kernels.rows import decoded, encode_rows

SCHEMES = (ActivationScheme(), ActivationScheme(128, True), ActivationScheme(0), ActivationScheme(0, True))
WIDTHS = (1, 5, 128, 300, 2048)


def draw(rows, width, g):
    """Rows of many magnitudes, zeros, values beside the borders of codes, and the largest there are."""
    x = torch.randn(rows, width, generator=g) * torch.exp2(
        torch.randint(-30, 30, (rows, 1), generator=g).float()
    )
    x[0] = 0.0
    x[1] = torch.randint(-448, 449, (width,), generator=g) / 4
    x[2] = torch.finfo(torch.bfloat16).max
    x[3, ::2] = 2.0**-120
    return x.bfloat16()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_row_has_its_codes_and_scales_and_little_more(scheme, width, g):
    form, x = RowFormat(width, scheme), draw(7, width, g)
    words, expected = quantise_to_words(x, form), quantise_rows(x, scheme)
    assert words.shape == (7, form.words) and words.dtype == torch.int32 and form.nbytes % 16 == 0
    assert torch.equal(form.codes(words).float(), expected.codes.float())
    assert torch.equal(form.scales(words), expected.scales)
    assert form.nbytes - (width + 4 * expected.scales.shape[1]) < 19
    assert torch.equal(decode_rows(words, form), expected.dequantise(scheme.group))


def test_a_wide_row_has_little_more_than_half_the_bytes():
    assert RowFormat(7168, ActivationScheme()).nbytes / (2 * 7168) == pytest.approx(0.516, abs=5e-4)


@pytest.mark.skipif(row_library.instruction_set() is None, reason="the library was not compiled")
@pytest.mark.parametrize("instructions", range(len(row_library.SETS)), ids=row_library.SETS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_compiled_codes_are_those_of_the_definition(scheme, width, instructions, g):
    if instructions > row_library.instruction_set():
        pytest.skip("this processor lacks the instructions")
    form, x = RowFormat(width, scheme), draw(9, width, g)
    words = row_library.encode_rows(x, form, instructions)
    assert torch.equal(words, quantise_to_words(x, form))
    rows = torch.randint(9, (13,), generator=g)
    for index in (None, rows):
        picked = words if index is None else words[index]
        got = row_library.decode_rows(words, index, form, instructions)
        assert torch.equal(got, decode_rows(picked, form).bfloat16())


@pytest.mark.skipif(row_library.instruction_set() is None, reason="the library was not compiled")
def test_compiled_code_decodes_every_code(g):
    form = RowFormat(256, ActivationScheme(0))
    words = torch.zeros(1, form.words, dtype=torch.int32)
    form.codes(words).view(torch.uint8)[0] = torch.arange(256, dtype=torch.uint8)
    form.scales(words)[0] = 0.37
    got, expected = row_library.decode_rows(words, None, form), decode_rows(words, form).bfloat16()
    assert torch.equal(got.isnan(), expected.isnan()) and int(got.isnan().sum()) == 2
    assert torch.equal(got.nan_to_num(), expected.nan_to_num())


@pytest.mark.skipif(row_library.instruction_set() is None, reason="the library was not compiled")
@pytest.mark.parametrize("group", [0, 128])
def test_a_value_that_is_not_finite_spoils_its_group_alone(group, g):
    form, x = RowFormat(300, ActivationScheme(group)), draw(6, 300, g)[4:]
    x[0, 3], x[1, 200] = float("nan"), float("-inf")
    for encode in (quantise_to_words, row_library.encode_rows):
        rows = decode_rows(encode(x, form), form)
        spoilt = rows.isnan()
        assert spoilt[0, :128].all() and spoilt[1, 128:256].any()
        assert group == 0 or (not spoilt[0, 128:].any() and not spoilt[1, :128].any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_decoded_rows_are_those_that_entries_name(dtype, g):
    form, x = RowFormat(128, ActivationScheme()), torch.randn(5, 128, generator=g).to(dtype)
    ids, weights, rows = torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1), torch.tensor([4, 0, 4])
    words = encode_rows(x, form)
    given = ExpertInput(words, ids, weights, rows, form)
    expected = quantise_rows(x[rows], form.scheme).dequantise(128).to(dtype)
    got = decoded(given, dtype)
    assert got.rows is None and got.row_format is None and torch.equal(got.hidden_states, expected)
    assert decoded(got, dtype) is got

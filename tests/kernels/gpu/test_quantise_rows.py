"""Rows as codes on the device against their definition, in the interpreter."""

import pytest
import torch

from xpar.kernels import quantised_rows
from xpar.kernels.gpu.quantise_rows import permute_codes, quantise_rows, split_rows
from xpar.kernels.quantised_weight import ActivationScheme


def draw(m, h, g):
    """Rows of many magnitudes, with zeros and, at the end, NaN."""
    x = torch.randn(m, h, generator=g) * torch.exp2(torch.randint(-20, 20, (m, 1), generator=g).float())
    x[0, :130] = 0.0
    x[-1, 5] = float("nan")
    return x.bfloat16()


@pytest.mark.parametrize("has_dot8", [True, False], ids=["e4m3", "bits"])
@pytest.mark.parametrize("power_of_two", [True, False], ids=["powers", "any"])
@pytest.mark.parametrize("group", [0, 128])
def test_codes_are_those_of_the_definition(group, power_of_two, has_dot8, g):
    x, rows = draw(9, 300, g), torch.randperm(9, generator=g)[:7]
    codes, scales = quantise_rows(
        x, rows, group=group, power_of_two=power_of_two, columns=384, has_dot8=has_dot8
    )
    expected = quantised_rows.quantise_rows(x[rows], ActivationScheme(group, power_of_two))
    found = codes[0].view(torch.float8_e4m3fn).float()
    bad = x[rows].isnan().any(1)
    assert torch.equal(scales.T[~bad], expected.scales[~bad])
    assert torch.equal(found[~bad, :300], expected.codes.float()[~bad])
    assert (found[~bad, 300:] == 0).all()
    assert scales.T[bad].isnan().any(1).all()


def test_rows_for_a_dispatch_have_their_scales_beside_each_other(g):
    x = draw(70, 300, g)[:-1]
    codes, scales = quantise_rows(x, group=128, power_of_two=True, by_row=True)
    expected = quantised_rows.quantise_rows(x, ActivationScheme(128, True))
    assert codes.shape == (1, 69, 300) and scales.shape == (69, 3)
    assert torch.equal(codes[0].float(), expected.codes.float()) and torch.equal(scales, expected.scales)


@pytest.mark.parametrize("has_dot8", [True, False], ids=["e4m3", "bits"])
@pytest.mark.parametrize("parts", [1, 2])
def test_two_terms_keep_the_bits_of_bfloat16(parts, has_dot8, g):
    x = draw(6, 200, g)[:-1]
    codes, scales, sums = split_rows(x, None, 256, parts=parts, half=32, has_sums=True, has_dot8=has_dot8)
    terms = codes.view(torch.float8_e4m3fn).float()
    values = terms.sum(0)
    row = values * scales.T.repeat_interleave(128, 1)
    floor = scales.T.repeat_interleave(128, 1)[:, :200] * 2.0**-10  # half of the second term's smallest step
    assert ((row[:, :200] - x.float()).abs() <= floor).all() and (row[:, 200:] == 0).all()
    if parts == 2:
        odd = torch.arange(256) // 16 % 2 == 1
        assert (terms[:2, :, odd] == 0).all() and (terms[2:, :, ~odd] == 0).all()
    else:
        assert torch.allclose(sums.T, values.view(5, -1, 32).sum(2), rtol=1e-5, atol=1e-3)


def test_permuted_rows_are_those_of_their_slots(g):
    codes = torch.randint(0, 127, (2, 5, 256), generator=g, dtype=torch.uint8)
    scales, slots = torch.rand(2, 5, generator=g), torch.randperm(15, generator=g).to(torch.int32)
    out, out_scales = permute_codes(codes, scales, slots, torch.tensor([11], dtype=torch.int32), 3)
    rows = slots[:11].long() // 3
    assert torch.equal(out[:, :11], codes[:, rows]) and torch.equal(out_scales[:, :11], scales[:, rows])
    assert out_scales[:, 11:].isnan().all()

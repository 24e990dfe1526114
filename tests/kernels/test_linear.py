"""Products of packed weights equal plain ones for every shape, and the choice of one gives its reasons."""

from itertools import product

import pytest
import torch

from xpar.kernels.cpu import zen_library
from xpar.kernels.cpu.linear import LINEAR_KERNELS, PLAIN, choose_linear

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
SERVED = [
    pytest.param(r, d, id=f"{r.name}-{str(d)[6:]}", marks=pytest.mark.skipif(bool(why), reason=str(why)))
    for r, d in product(LINEAR_KERNELS, TOLERANCE)
    if d in r.dtypes
    for why in [r.why_not(d)]
]
SHAPES = ((2048, 64), (333, 200), (7, 5), (1, 96), (130, 1))


def error(found, x, weight, bias=None):
    """Return the error of ``found`` relative to ``x @ weight.T + bias``.

    If the addends cancel, it is relative to what they would add up to by chance.
    """
    x, weight = x.double(), weight.double()
    bias = torch.zeros(len(weight)) if bias is None else bias.double()
    expected = x @ weight.T + bias
    by_chance = (x**2 @ (weight**2).T + bias**2).sqrt()
    return float((found.double() - expected).norm() / max(expected.norm(), by_chance.norm()))


@pytest.mark.parametrize(("entry", "dtype"), SERVED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_products_equal_float64_ones(entry, dtype, shape, biased, g):
    weight = torch.randn(*shape, generator=g).to(dtype)
    bias = torch.randn(shape[0], generator=g).to(dtype) if biased else None
    # The same memory with another weight: a packed weight must not depend on the address.
    place = torch.randn(*shape, generator=g).to(dtype)
    other, linears = place.clone(), [entry.build(place, None)]
    linears.append(entry.build(place.copy_(weight), bias))
    place.zero_()
    for rows in (1, 2, 3, 17, 70):
        x = torch.randn(rows, shape[1], generator=g).to(dtype)
        found = linears[1](x)
        assert found.shape == (rows, shape[0]) and found.dtype == dtype and found.is_contiguous()
        assert error(found, x, weight, bias) < TOLERANCE[dtype]
        assert error(linears[0](x), x, other) < TOLERANCE[dtype]


@pytest.mark.parametrize(("entry", "dtype"), SERVED)
def test_no_rows_give_no_rows_and_no_complaint(entry, dtype, capfd):
    linear = entry.build(torch.ones(5, 3, dtype=dtype), None)
    assert linear(torch.empty(0, 3, dtype=dtype)).shape == (0, 5)
    assert not capfd.readouterr().err


@pytest.mark.parametrize(("entry", "dtype"), SERVED)
def test_threads_may_change_after_packing(entry, dtype, g):
    weight, before = torch.randn(515, 130, generator=g).to(dtype), torch.get_num_threads()
    x = torch.randn(40, 130, generator=g).to(dtype)
    try:
        for packing, computing in ((1, 2), (2, 1), (2, 3)):
            torch.set_num_threads(packing)
            linear = entry.build(weight, None)
            torch.set_num_threads(computing)
            for rows in (1, 9, 40):
                assert error(linear(x[:rows]), x[:rows], weight) < TOLERANCE[dtype], (
                    packing,
                    computing,
                    rows,
                )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("entry", "dtype"), SERVED)
def test_a_packed_weight_takes_no_more_memory(entry, dtype):
    weight, bias = torch.ones(1024, 512, dtype=dtype), torch.ones(1024, dtype=dtype)
    plain = weight.nbytes + bias.nbytes
    assert plain <= entry.build(weight, bias).nbytes() <= 1.01 * plain


def test_the_fastest_that_serves_is_chosen(monkeypatch):
    monkeypatch.setattr(zen_library, "why_unavailable", lambda: "not today")
    monkeypatch.setattr("xpar.kernels.cpu.linear_onednn.torch._C._has_mkldnn", True)
    chosen = choose_linear(torch.bfloat16)
    assert dict(chosen.rejected)["zentorch"] == "not today"
    monkeypatch.setattr(zen_library, "why_unavailable", lambda: None)
    chosen = choose_linear(torch.bfloat16)
    assert chosen.name == "zentorch" and dict(chosen.rejected)["onednn"] == "measured slower than zentorch"
    assert (
        dict(choose_linear(torch.float16).rejected)["zentorch"] == "serves bfloat16 and float32, not float16"
    )


def test_a_name_chooses_that_product_or_says_why_not():
    plain = choose_linear(torch.bfloat16, "plain")
    assert plain.name == PLAIN
    assert set(dict(plain.rejected)) == {entry.name for entry in LINEAR_KERNELS}
    with pytest.raises(
        ValueError, match=r"dense='blas': there is none of that name; choose auto or one of (\w+, )*plain"
    ):
        choose_linear(torch.bfloat16, "blas")
    with pytest.raises(
        ValueError, match="dense='zentorch': serves bfloat16 and float32, not float16; choose"
    ):
        choose_linear(torch.float16, "zentorch")


def test_plain_products_are_left_if_nothing_serves():
    assert choose_linear(torch.float32, entries=()).name == PLAIN

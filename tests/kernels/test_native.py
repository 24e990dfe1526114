"""The compiled products are right, with the same bits for all instruction sets, rows and threads."""

import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from xpar.kernels.cpu import native_library
from xpar.kernels.cpu.linear import choose_linear
from xpar.kernels.cpu.native_library import InstructionSet, PackedWeights

REASON = native_library.why_unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture
def fresh():
    """Forget what is known of the library, before and after the test."""
    forget_library()
    yield
    forget_library()


def forget_library() -> None:
    for function in (
        native_library.why_unavailable,
        native_library.lanes,
        native_library.best_set,
        native_library.load,
    ):
        function.cache_clear()


WIDTHS = [w for w in (8, 16) if REASON is None and w <= native_library.lanes()]
SETS = [InstructionSet(lanes) for lanes in WIDTHS]
SETS += [native_library.best_set()] if REASON is None and native_library.best_set().in_bfloat16 else []
by_set = pytest.mark.parametrize(
    "isa", SETS, ids=[f"{isa.lanes} lanes{', bfloat16' * isa.in_bfloat16}" for isa in SETS]
)
SHAPES = [(1, 1), (16, 2), (31, 7), (33, 64), (100, 129), (515, 96)]


def pack(weights, biases, isa):
    experts, outputs, inputs = weights.shape
    found = PackedWeights(experts, outputs, inputs, biases is not None, isa)
    for expert in range(experts):
        found.load(expert, weights[expert], None if biases is None else biases[expert])
    return found


def uneven(experts, g):
    """Return spans of 1 to 40 rows for some of the experts, in any order."""
    spans, first = [], 0
    for expert in torch.randperm(experts, generator=g)[: experts // 2 + 1].tolist():
        count = int(torch.randint(1, 41, (1,), generator=g))
        spans.append((expert, first, first + count))
        first += count
    return spans


@by_set
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_products_of_spans_equal_float64_ones(outputs, inputs, has_bias, isa, g):
    weights = torch.randn(5, outputs, inputs, generator=g).bfloat16()
    biases = torch.randn(5, outputs, generator=g).bfloat16() if has_bias else None
    spans = uneven(5, g)
    total = spans[-1][2]
    x = torch.randn(17, inputs, generator=g).bfloat16()
    rows = torch.randint(17, (total,), generator=g)
    found = pack(weights, biases, isa).multiply(x, spans, rows)
    assert found.shape == (total, outputs)
    for expert, first, end in spans:
        expected = x[rows[first:end]].double() @ weights[expert].double().T
        expected += 0 if biases is None else biases[expert].double()
        # Rounded to bfloat16 once (2^-8), after sums whose rounding is that of float32.
        bound = expected.abs() * 2**-8 + 1e-6 * inputs
        assert bool(((found[first:end].double() - expected).abs() <= bound).all())


@pytest.mark.skipif(
    len(WIDTHS) < 2, reason="this processor has no AVX-512: there is one instruction set to run"
)
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_instruction_sets_give_the_same_bits(outputs, inputs, g):
    weights = torch.randn(3, outputs, inputs, generator=g).bfloat16()
    x = torch.randn(60, inputs, generator=g).bfloat16()
    spans = [(1, 0, 13), (0, 13, 60)]
    narrow, wide = (pack(weights, None, InstructionSet(lanes)).multiply(x, spans) for lanes in (8, 16))
    assert torch.equal(narrow, wide)


@by_set
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
def test_bits_are_those_of_a_row_alone(has_bias, isa, g):
    """For 1 to 30 rows, and for as many panels as a tile reads or fewer, the last one filled in part."""
    for outputs in (5, 3 * isa.lanes, 5 * isa.lanes + 1, 16 * isa.lanes - 3):
        weights = torch.randn(1, outputs, 70, generator=g).bfloat16()
        biases = torch.randn(1, outputs, generator=g).bfloat16() if has_bias else None
        x, weights_of = torch.randn(30, 70, generator=g).bfloat16(), pack(weights, biases, isa)
        single = torch.cat([weights_of.multiply(row[None], [(0, 0, 1)]) for row in x])
        for rows in (*range(1, 16), 24, 25, 30):
            assert torch.equal(weights_of.multiply(x[:rows].contiguous(), [(0, 0, rows)]), single[:rows])


@by_set
def test_many_rows_go_by_several_calls(isa, g):
    weights = torch.randn(4, 50, 30, generator=g).bfloat16()
    x = torch.randn(300, 30, generator=g).bfloat16()
    weights_of = pack(weights, None, isa)
    spans = [(2, 0, 7), (3, 7, 207), (0, 207, 300)]
    rows = torch.randperm(300, generator=g)
    whole = weights_of.multiply(x, spans, rows)
    assert torch.equal(weights_of.multiply(x, spans, rows, buffer_bytes=1), whole)


@by_set
def test_special_values_stay_in_their_rows(isa):
    """Infinity, NaN, overflow of bfloat16, ties and the sign of zero are rounded as torch does it."""
    weights_of = pack(torch.eye(40)[None].bfloat16(), None, isa)
    x = torch.zeros(4, 40)
    x[1, 3], x[2, 5] = float("inf"), float("nan")
    found = weights_of.multiply(x.bfloat16(), [(0, 0, 4)])
    assert bool((found[[0, 3]] == 0).all())
    assert found[1, 3] == float("inf") and bool(found[2].isnan().all())
    ones = pack(torch.tensor([[[1.0, 1.0]]]).bfloat16(), None, isa)
    pairs = torch.tensor(
        [[1.0, 2**-8], [1.0, 3 * 2**-8], [-1.0, -(2**-8)], [3.38e38, 3.38e38], [1.0, 2**-7.5]]
    )
    x = pairs.bfloat16()
    assert torch.equal(ones.multiply(x, [(0, 0, 5)]), x.float().sum(1, keepdim=True).bfloat16())


def test_threads_are_torchs_own():
    """A second OpenMP runtime in the process would bring threads that wait beside torch's."""
    program = Path(__file__).parents[1] / "programs/openmp_runtimes.py"
    done = subprocess.run([sys.executable, program], check=False, capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "1", done.stdout + done.stderr


def test_wrong_rows_are_refused():
    weights_of = pack(torch.ones(1, 8, 4), None, SETS[0])
    with pytest.raises(
        ValueError, match=r"x is \(3, 5\) torch.bfloat16: expected contiguous bfloat16 rows of 4"
    ):
        weights_of.multiply(torch.ones(3, 5).bfloat16(), [(0, 0, 3)])
    with pytest.raises(ValueError, match=r"float32: expected contiguous bfloat16"):
        weights_of.multiply(torch.ones(3, 4), [(0, 0, 3)])


def test_a_missing_library_is_a_reason(fresh, monkeypatch):
    monkeypatch.setattr(native_library, "find_spec", lambda name: None)
    assert "not compiled when xpar was installed" in str(native_library.why_unavailable())
    choice = choose_linear(torch.bfloat16)
    assert choice.name != "native" and "not compiled" in dict(choice.rejected)["native"]


def test_a_broken_library_is_a_reason(fresh, monkeypatch, tmp_path):
    (tmp_path / "other.so").write_text("no library")
    spec = ModuleSpec("other", None, origin=str(tmp_path / "other.so"))
    monkeypatch.setattr(native_library, "find_spec", lambda name: spec)
    assert "other.so" in str(native_library.why_unavailable())

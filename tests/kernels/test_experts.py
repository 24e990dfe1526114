"""Every expert kernel against the fp32 reference."""

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from xpar.kernels import reference
from xpar.kernels.contracts import Activation, ExpertInput, ExpertKernel, ExpertSpec
from xpar.kernels.registry import KERNELS

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
OTHERS = [  # one of each kind that a kernel may compute in another way than the plain ones
    Activation("silu", limit=7.0, alpha=1.702, beta=1.0),
    Activation("swiglustep", limit=1.0),
    Activation("situ", beta=2.0, limit=1.5),
    Activation("relu2", gated=False),
]


@dataclass(frozen=True)
class Case:
    """A batch; ``drop``: share of slots whose expert is on another rank, ``ids``: the choice of experts."""

    tokens: int
    k: int
    experts: int = 8
    drop: float = 0.0
    ids: str = "random"
    hidden: int = 128
    width: int = 192

    def __str__(self) -> str:
        sizes = f"T{self.tokens}-k{self.k}-E{self.experts}-{self.ids}-drop{self.drop}"
        return f"{sizes}-H{self.hidden}-I{self.width}"


CASES = [
    Case(tokens=1, k=2),
    Case(tokens=17, k=3),
    Case(tokens=130, k=2, drop=0.5),
    Case(tokens=5, k=8),
    Case(tokens=9, k=4, drop=0.9),
    Case(tokens=0, k=2),
    Case(tokens=7, k=2, drop=1.0),
    Case(tokens=33, k=1, ids="one"),
    Case(tokens=1, k=1, ids="one"),
    Case(tokens=40, k=2, ids="skewed"),
    Case(tokens=40, k=1, experts=1, ids="one"),
    Case(tokens=12, k=1, experts=1, ids="one", drop=0.3),
    Case(tokens=19, k=2, hidden=100, width=36),
]


PLAIN = [entry for entry in KERNELS if "cpu" in entry.devices and entry.name != "native-quantised"]
"""The kernels of plain weights; those of quantised ones are in ``test_quantised_experts.py``."""


def specs() -> list[Any]:
    """Return kernels x dtypes x activations x biases; those that cannot run here are skipped."""
    found = []
    for entry in KERNELS:
        if entry not in PLAIN:
            continue
        activations = [Activation(name) for name in entry.activations]
        forms = [(a, False) for a in activations]
        if entry.all_activations:
            forms += [(a, a.gated) for a in OTHERS]
        for dtype, (activation, bias) in itertools.product(entry.dtypes, forms):
            if dtype != torch.bfloat16 and activation.is_plain and activation.name != "silu":
                continue
            spec = ExpertSpec(8, 128, 192, dtype, activation, bias=bias)
            reason = entry.why_not(spec)
            marks = [pytest.mark.skip(reason=reason)] if reason else []
            name = f"{entry.name}-{str(dtype).removeprefix('torch.')}-{activation}{'-bias' * bias}"
            found.append(pytest.param(entry, dtype, (activation, bias), id=name, marks=marks))
    return found


def cells() -> list[Any]:
    """Return all of ``specs`` with every case, without the widths that a kernel refuses."""
    found = []
    for spec, case in itertools.product(specs(), CASES):
        entry, dtype, (activation, bias) = spec.values
        sizes = ExpertSpec(case.experts, case.hidden, case.width, dtype, activation, bias=bias)
        if spec.marks or not entry.why_not(sizes):
            found.append(pytest.param(*spec.values, case, id=f"{spec.id}-{case}", marks=spec.marks))
    return found


class Layer:
    """Random weights and inputs of one case, and the reference's results."""

    def __init__(
        self, case: Case, dtype: torch.dtype, form: tuple[Activation, bool], seed: int, **fields: object
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        e, h, i = case.experts, case.hidden, case.width
        activation, bias = form
        self.spec = ExpertSpec(e, h, i, dtype, activation, bias=bias, **fields)  # type: ignore[arg-type]
        packed = activation.gate_up_rows(i)
        self.gate_up = (torch.randn(e, packed, h, generator=g) / h**0.5).to(dtype)
        self.down = (torch.randn(e, h, i, generator=g) / i**0.5).to(dtype)
        self.biases = [torch.randn(e, n, generator=g).to(dtype) for n in (packed, h) if bias]
        self.hidden = torch.randn(case.tokens, h, generator=g).to(dtype)
        self.weights = torch.rand(case.tokens, case.k, generator=g)
        self.ids = _ids(case, g)
        self.weights[self.ids < 0] = float("nan")

    def kernel(self, build: object) -> ExpertKernel:
        kernel: ExpertKernel = build(self.spec)  # type: ignore[operator]
        for expert in range(self.spec.num_experts):
            biases = [b[expert] for b in self.biases]
            kernel.load_expert(expert, self.gate_up[expert], self.down[expert], *biases)
        return kernel

    def input(self, rows: Tensor | None = None) -> ExpertInput:
        return ExpertInput(self.hidden, self.ids, self.weights, rows)

    def expected(self, hidden: Tensor) -> Tensor:
        return reference.routed_experts(
            hidden, self.ids, self.weights, self.gate_up, self.down, self.spec.activation, *self.biases
        )

    def expected_slots(self, hidden: Tensor) -> Tensor:
        weights = (self.gate_up, self.down)
        slots = reference.expert_slots(hidden, self.ids, *weights, self.spec.activation, *self.biases)
        return slots[self.ids >= 0]


def _ids(case: Case, g: torch.Generator) -> Tensor:
    scores = torch.rand(case.tokens, case.experts, generator=g)
    if case.ids == "skewed":
        scores[:, 2:4] += torch.tensor([1.0, 0.7])
    ids = scores.topk(case.k).indices
    if case.ids == "one":
        ids = torch.full_like(ids, case.experts // 2)
    dropped = torch.rand(case.tokens, case.k, generator=g) < case.drop
    return ids.masked_fill(dropped, -1).to(torch.int32)


def assert_near(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype and got.shape == expected.shape
    error = (got.float() - expected).norm()
    assert error <= TOLERANCE[dtype] * expected.norm(), f"relative error {error / expected.norm():.2e}"


def _skip_if_refused(entry: object, spec: ExpertSpec) -> None:
    if reason := entry.why_not(spec):  # type: ignore[attr-defined]
        pytest.skip(reason)


@pytest.mark.parametrize(("entry", "dtype", "form", "case"), cells())
def test_equals_reference(entry, dtype, form, case, fresh_seed):
    layer = Layer(case, dtype, form, fresh_seed)
    kernel = layer.kernel(entry.build)
    assert_near(kernel.compute(layer.input()), layer.expected(layer.hidden), dtype)
    assert_near(kernel.compute_slots(layer.input()), layer.expected_slots(layer.hidden), dtype)
    beyond = kernel.nbytes() - layer.gate_up.nbytes - layer.down.nbytes
    biases = sum(bias.nbytes for bias in layer.biases)
    if case.hidden % 64 == 0:  # packing rounds ragged widths up to whole tiles
        assert biases <= beyond <= 2 * biases  # which may be held in float32


@pytest.mark.parametrize("drop", [0.0, 0.4], ids="drop{}".format)
@pytest.mark.parametrize(("entry", "dtype", "form"), specs())
def test_rows_are_gathered_and_out_is_used(entry, dtype, form, drop, g):
    layer = Layer(Case(tokens=23, k=3, drop=drop), dtype, form, g.initial_seed())
    _skip_if_refused(entry, layer.spec)
    kernel = layer.kernel(entry.build)
    rows = torch.randint(23, (23,), generator=g)
    expected = layer.expected(layer.hidden[rows])
    whole = torch.full((30, 128), float("nan"), dtype=dtype)
    window = whole[4:27]
    result = kernel.compute(layer.input(rows), out=window)
    assert result.data_ptr() == window.data_ptr()
    assert_near(window, expected, dtype)
    assert whole[:4].isnan().all() and whole[27:].isnan().all()
    assert_near(kernel.compute_slots(layer.input(rows)), layer.expected_slots(layer.hidden[rows]), dtype)


@pytest.mark.parametrize(("entry", "dtype", "form"), specs())
def test_rows_that_no_entry_names_are_not_read(entry, dtype, form, g):
    layer = Layer(Case(tokens=6, k=2), dtype, form, g.initial_seed())
    kernel = layer.kernel(entry.build)
    poisoned = torch.full((11, 128), float("nan"), dtype=dtype)
    poisoned[2:8] = layer.hidden
    x = ExpertInput(poisoned, layer.ids, layer.weights, torch.arange(2, 8))
    assert_near(kernel.compute(x), layer.expected(layer.hidden), dtype)


@pytest.mark.parametrize(("entry", "dtype", "form"), specs())
def test_weights_are_copied_and_kernels_independent(entry, dtype, form, fresh_seed):
    case, second_seed = Case(tokens=16, k=2), fresh_seed + 1
    first, second = (Layer(case, dtype, form, seed) for seed in (fresh_seed, second_seed))
    kernels = [first.kernel(entry.build)]
    expected = first.expected(first.hidden)
    first.gate_up.zero_(), first.down.zero_()
    for attempt in range(3):  # memory of dropped kernels must not be mistaken for theirs
        again = second.kernel(entry.build)
        assert_near(again.compute(second.input()), second.expected(second.hidden), dtype)
        second = Layer(case, dtype, form, second_seed + attempt + 1)
        del again
    assert_near(kernels[0].compute(first.input()), expected, dtype)


@pytest.mark.parametrize("entry", PLAIN, ids=lambda r: r.name)
def test_refuses_wrong_weights(entry):
    spec = ExpertSpec(2, 64, 128, torch.bfloat16, Activation("silu"))
    _skip_if_refused(entry, spec)
    kernel = entry.build(spec)
    gate_up, down = torch.zeros(256, 64), torch.zeros(64, 128)
    with pytest.raises(ValueError, match="expert 2: this rank holds experts 0 to 1"):
        kernel.load_expert(2, gate_up, down)
    with pytest.raises(ValueError, match=r"gate_up is \(64, 256\), expected \(256, 64\)"):
        kernel.load_expert(0, gate_up.T, down)
    with pytest.raises(ValueError, match=r"down_bias is \(64,\), expected None"):
        kernel.load_expert(0, gate_up, down, None, torch.zeros(64))
    kernel.load_expert(0, gate_up, down)
    x = ExpertInput(
        torch.zeros(1, 64, dtype=spec.dtype), torch.tensor([[1]], dtype=torch.int32), torch.ones(1, 1)
    )
    with pytest.raises(RuntimeError, match="expert 1 has tokens but no weights"):
        kernel.compute(x)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(128, 192), (1024, 256), (100, 36)], ids=str)
@pytest.mark.parametrize(
    ("entry", "dtype"),
    [pytest.param(r, dtype, id=f"{r.name}-{dtype}") for r in PLAIN if r.row_invariant for dtype in r.dtypes],
)
def test_rows_do_not_depend_on_the_batch(entry, dtype, shape, threads, g):
    case = Case(tokens=300, k=2, experts=4, ids="skewed", hidden=shape[0], width=shape[1])
    form = (Activation("silu", limit=7.0), True)
    layer = Layer(case, dtype, form, g.initial_seed(), row_invariant=True)
    _skip_if_refused(entry, layer.spec)
    kernel = layer.kernel(entry.build)
    whole = kernel.compute_slots(layer.input()).view(300, 2, -1)
    summed = kernel.compute(layer.input())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for size in [*range(1, 71, 3), 2, 8, 15, 64, 128, 257]:
            pick = torch.randperm(300, generator=g)[:size]
            part = ExpertInput(layer.hidden, layer.ids[pick], layer.weights[pick], pick)
            assert torch.equal(kernel.compute_slots(part).view(size, 2, -1), whole[pick]), f"{size} rows"
            assert torch.equal(kernel.compute(part), summed[pick]), f"{size} rows"
    finally:
        torch.set_num_threads(before)

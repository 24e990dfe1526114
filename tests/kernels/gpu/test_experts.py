"""The Triton experts against the fp32 reference, in the interpreter."""

from dataclasses import dataclass, replace

import pytest
import torch

from xpar.kernels import reference
from xpar.kernels.contracts import Activation, ExpertInput, ExpertSpec, Slots
from xpar.kernels.gpu import experts
from xpar.kernels.gpu.experts import TritonExperts
from xpar.kernels.gpu.tile_tables import NO_LIMIT, Height, Machine, Table, Tile, Tiles, Vector

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# Small tiles: every size below needs several tiles, several steps of the sum and several rounds of programs.
TABLE = Table(
    gate_up=(
        Tile(16, 32, 32, stages=2, warps=4, per_sm=1),
        Tile(32, 32, 64, stages=2, warps=4, per_sm=1, group=2),
        Tile(64, 64, 32, stages=2, warps=4, per_sm=1, group=2),
    ),
    down=(
        Tile(16, 64, 32, stages=2, warps=4, per_sm=1, group=3),
        Tile(32, 32, 64, stages=2, warps=4, per_sm=1),
        Tile(64, 32, 64, stages=2, warps=4, per_sm=1, group=2),
    ),
    gate_up_vector=Vector(8, 64, stages=2, warps=4),
    down_vector=Vector(16, 32, stages=2, warps=4),
)
FORMS = [
    Activation("silu"),
    Activation("silu", limit=0.7, alpha=1.702, beta=1.0),
    Activation("gelu"),
    Activation("gelu_tanh"),
    Activation("swiglustep", limit=0.5),
    Activation("situ", beta=0.8, limit=0.6),
    Activation("situ", beta=0.8),
    Activation("silu", gated=False),
    Activation("gelu", gated=False),
    Activation("gelu_tanh", gated=False),
    Activation("relu2", gated=False),
]


@dataclass(frozen=True)
class Case:
    """A batch; ``drop``: share of slots of other ranks, ``skew``: preference for the first expert.

    The last expert gets no slot.
    """

    tokens: int
    k: int
    experts: int = 6
    hidden: int = 64
    width: int = 48
    drop: float = 0.0
    skew: float = 0.0
    rows: bool = False
    vector_tokens: int = 0

    def __str__(self):
        return "-".join(f"{name}{value}" for name, value in vars(self).items() if value)


CASES = [
    Case(tokens=0, k=2),
    Case(tokens=1, k=2, vector_tokens=4),
    Case(tokens=3, k=1, drop=0.5, rows=True, vector_tokens=4, hidden=100, width=36),
    Case(tokens=9, k=3, rows=True),
    Case(tokens=7, k=2, drop=1.0),
    Case(tokens=1, k=2, drop=1.0, vector_tokens=4),
    Case(tokens=5, k=2, hidden=99, width=37, drop=0.3),
    Case(tokens=20, k=1, experts=1, hidden=40, width=40),
    Case(tokens=40, k=2, drop=0.2, skew=1.0),
    Case(tokens=72, k=2, experts=5, skew=3.0, rows=True, hidden=72, width=40),
    Case(tokens=80, k=4, experts=5, drop=0.1, hidden=50, width=30),
]


class Layer:
    """Random weights and inputs of one case."""

    def __init__(self, case, dtype, activation, bias, g, row_invariant=False):
        e, h, i = case.experts, case.hidden, case.width
        self.spec = ExpertSpec(e, h, i, dtype, activation, bias=bias, row_invariant=row_invariant)
        packed = activation.gate_up_rows(i)
        self.gate_up = (torch.randn(e, packed, h, generator=g) / h**0.5).to(dtype)
        self.down = (torch.randn(e, h, i, generator=g) / i**0.5).to(dtype)
        self.biases = [torch.randn(e, n, generator=g).to(dtype) for n in (packed, h) if bias]
        hidden = torch.randn(case.tokens + 5, h, generator=g).to(dtype)
        scores = torch.rand(case.tokens, e, generator=g)
        scores[:, 0] += case.skew
        if e > case.k:
            scores[:, -1] -= 9.0
        ids = scores.topk(case.k).indices.to(torch.int32)
        ids[torch.rand(ids.shape, generator=g) < case.drop] = -1
        weights = torch.rand(case.tokens, case.k, generator=g)
        weights[ids < 0] = float("nan")
        rows = torch.randint(5, case.tokens + 5, (case.tokens,), generator=g) if case.rows else None
        hidden[slice(5) if case.rows else slice(case.tokens, None)] = float("nan")  # rows that no entry names
        self.x = ExpertInput(hidden, ids, weights, rows)
        self.read = hidden[: case.tokens] if rows is None else hidden[rows]
        self.table = replace(TABLE, vector_tokens=case.vector_tokens)

    def kernel(self):
        kernel = TritonExperts(self.spec, self.table, Machine(sms=3, capability=(9, 0)))
        for e in range(self.spec.num_experts):
            kernel.load_expert(e, self.gate_up[e], self.down[e], *(b[e] for b in self.biases))
        return kernel

    def check(self, kernel, slots=True):
        dtype, weights = self.spec.dtype, (self.gate_up, self.down)
        x, activation = self.x, self.spec.activation
        expected = reference.routed_experts(
            self.read, x.topk_ids, x.topk_weights, *weights, activation, *self.biases
        )
        assert_near(kernel.compute(x), expected, dtype)
        if slots:
            each = reference.expert_slots(self.read, x.topk_ids, *weights, activation, *self.biases)
            assert_near(kernel.compute_slots(x), each[x.topk_ids >= 0], dtype)


def assert_near(got, expected, dtype):
    assert got.dtype == dtype and got.shape == expected.shape
    error = (got.float() - expected).norm()
    assert error <= TOLERANCE[dtype] * expected.norm(), f"relative error {error / expected.norm():.2e}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_reference(case, g):
    layer = Layer(case, torch.bfloat16, FORMS[0], False, g)
    layer.check(layer.kernel())


_WIDE, _NARROW = Tile(32, 64, 32, 2, 4, 1, group=2), Tile(32, 32, 64, 2, 4, 1)
ONE_LIST = {
    "swapped": Tiles(_NARROW, _WIDE, swapped=True),
    "in order": Tiles(_WIDE, _NARROW, swapped=False),
    "tall": Tiles(_NARROW, _WIDE, swapped=False, tall=True),
    "gathered": Tiles(_WIDE, _NARROW, swapped=False, gathered=True),
}
VARIANTS = {
    **{name: {"heights": (Height(NO_LIMIT, tiles),)} for name, tiles in ONE_LIST.items()},
    "below the averages of all heights": {"heights": (Height(1.0, ONE_LIST["swapped"]), Height(90.0, None))},
    "ranked in blocks": {"ranked_slots": 0},
    "tall in lists": {"tall": True, "limits": (0, 0)},
    "few and some in several tiles": {"limits": (50, 84)},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_tables_compute_the_same(name, g):
    """Last tiles of 20, 33, 32 and 30 of 64 rows after 0, 1 and 2 whole ones, in other lists of tiles."""
    layer = Layer(Case(371, 1, experts=5, hidden=40, width=72), torch.float16, FORMS[0], True, g)
    ids = torch.arange(4, dtype=torch.int32).repeat_interleave(torch.tensor([84, 97, 160, 30]))
    layer.x.topk_ids[:, 0] = ids[torch.randperm(371, generator=g)]
    layer.table = replace(layer.table, **VARIANTS[name])
    layer.check(layer.kernel())


@pytest.mark.parametrize("case", [CASES[i] for i in (2, 3, 4, 6, 7, 9, 10)], ids=str)
@pytest.mark.parametrize("name", ONE_LIST)
def test_one_height_equals_the_reference(name, case, g):
    layer = Layer(replace(case, vector_tokens=0), torch.bfloat16, FORMS[1], True, g)
    layer.table = replace(layer.table, **VARIANTS[name])
    layer.check(layer.kernel())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_activations_of_gathered_rows(form, g):
    layer = Layer(Case(70, 1, experts=2, hidden=40, width=24), torch.float32, form, True, g)
    layer.table = replace(layer.table, **VARIANTS["gathered"])
    layer.check(layer.kernel(), slots=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", [CASES[i] for i in (2, 6, 9)], ids=str)
def test_dtypes_equal_the_reference(case, dtype, g):
    layer = Layer(case, dtype, FORMS[0], True, g)
    layer.check(layer.kernel(), slots=False)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_activations_equal_the_reference(form, bias, g):
    """Each of the three gate-up kernels computes every activation; fp32 hides no wrong formula."""
    for case in (Case(2, 1, vector_tokens=4), Case(6, 1)):
        layer = Layer(case, torch.float32, form, bias, g)
        layer.check(layer.kernel(), slots=False)


@pytest.mark.parametrize("form", FORMS[:2] + FORMS[-1:], ids=str)
def test_activations_of_many_rows(form, g):
    layer = Layer(Case(70, 1, experts=2, hidden=40, width=24), torch.float32, form, True, g)
    layer.check(layer.kernel(), slots=False)


def test_out_is_used(g):
    for case in (Case(3, 2, vector_tokens=4, experts=12), Case(20, 2)):
        layer = Layer(case, torch.bfloat16, FORMS[0], False, g)
        kernel = layer.kernel()
        expected = kernel.compute(layer.x)
        whole = torch.full((case.tokens + 4, 64), float("nan"), dtype=torch.bfloat16)
        window = whole[2:-2]
        assert kernel.compute(layer.x, out=window).data_ptr() == window.data_ptr()
        assert torch.equal(window, expected)
        assert whole[:2].isnan().all() and whole[-2:].isnan().all()
        apart = torch.empty(case.tokens, 128, dtype=torch.bfloat16)[:, ::2]
        assert kernel.compute(layer.x, out=apart) is apart and torch.equal(apart, expected)


def test_unsummed_slots_lie_at_their_places(g):
    """Where the kernel sums very few tokens at no cost it returns the sums, but never in exact mode."""
    for case, sums in ((Case(3, 2, vector_tokens=4, experts=12), True), (Case(20, 2), False)):
        layer = Layer(case, torch.bfloat16, FORMS[0], False, g)
        kernel, active = layer.kernel(), layer.x.topk_ids.reshape(-1) >= 0
        slots = kernel.compute_unsummed(layer.x, exact=True)
        assert isinstance(slots, Slots) and slots.rows.shape == (active.numel(), 64)
        assert torch.equal(slots.rows[active], kernel.compute_slots(layer.x))
        found = kernel.compute_unsummed(layer.x)
        if sums:
            assert torch.equal(found, kernel.compute(layer.x))
        else:
            assert torch.equal(found.rows[active], slots.rows[active])


def test_rows_do_not_depend_on_the_batch(g):
    case = Case(80, 2, experts=3, skew=0.5)
    layer = Layer(case, torch.bfloat16, FORMS[1], True, g, row_invariant=True)
    kernel = layer.kernel()
    whole, slots = kernel.compute(layer.x), kernel.compute_slots(layer.x).view(80, 2, -1)
    for size in (1, 3, 40):
        pick = torch.randperm(80, generator=g)[:size]
        x = ExpertInput(layer.x.hidden_states, layer.x.topk_ids[pick], layer.x.topk_weights[pick], pick)
        assert torch.equal(kernel.compute(x), whole[pick])
        assert torch.equal(kernel.compute_slots(x).view(size, 2, -1), slots[pick])


def test_batches_reach_every_kernel(g, monkeypatch):
    """The sizes above reach every kernel; without this the comparisons could pass on one of them alone."""
    seen = set()
    for name in (
        "gate_up_vector",
        "gate_up_small",
        "gate_up_tiled",
        "gate_up_gathered",
        "down_vector",
        "down_small",
        "down_tiled",
    ):
        kernel = getattr(experts, name)

        class Recording:
            def __getitem__(self, grid, name=name, kernel=kernel):
                def launch(*args, **kwargs):
                    seen.add((name, kwargs.get("BUCKET")))
                    return kernel[grid](*args, **kwargs)

                return launch

        monkeypatch.setattr(experts, name, Recording())
    lists, gathered = {}, VARIANTS["gathered"]
    many = Case(72, 2, experts=5, skew=3.0, hidden=16, width=16)
    for case, variant in ((CASES[1], lists), (many, lists), (many, gathered)):
        layer = Layer(case, torch.float16, FORMS[0], False, g)
        layer.table = replace(layer.table, **variant)
        layer.check(layer.kernel(), slots=False)
    both = {f"{stage}_{size}" for stage in ("gate_up", "down") for size in ("small", "tiled")}
    assert seen == {("gate_up_vector", None), ("down_vector", None), ("gate_up_gathered", 2)} | {
        (name, bucket) for name in both for bucket in ([2] if "tiled" in name else [0, 1])
    }


def test_missing_and_wrong_weights_are_refused():
    kernel = TritonExperts(
        ExpertSpec(2, 32, 16, torch.float32, FORMS[0]), TABLE, Machine(sms=3, capability=(9, 0))
    )
    kernel.load_expert(0, torch.zeros(32, 32), torch.zeros(32, 16))
    x = ExpertInput(torch.zeros(1, 32), torch.tensor([[1]], dtype=torch.int32), torch.ones(1, 1))
    for compute in (kernel.compute, kernel.compute_slots):
        with pytest.raises(RuntimeError, match="expert 1 has tokens but no weights"):
            compute(x)
    with pytest.raises(ValueError, match=r"gate_up is \(16, 32\), expected \(32, 32\)"):
        kernel.load_expert(1, torch.zeros(16, 32), torch.zeros(32, 16))
    assert kernel.nbytes() == 2 * 3 * 32 * 16 * 4

"""The Triton experts of e4m3 codes against the reference and its emulation, in the interpreter."""

from dataclasses import dataclass, replace

import pytest
import torch

from xpar.kernels.contracts import Activation, ExpertInput, ExpertSpec
from xpar.kernels.gpu.code_tables import CodeTable, Height
from xpar.kernels.gpu.quantised_experts import QuantisedExperts
from xpar.kernels.gpu.tile_tables import Machine, Tile, Vector
from xpar.kernels.quantised_rows import quantised_mlp
from xpar.kernels.quantised_weight import ActivationScheme, CodeType, QuantisedWeight, WeightFormat
from xpar.kernels.reference import mlp

HOPPER, AMPERE = Machine(sms=3, capability=(9, 0)), Machine(sms=3, capability=(8, 0))
BLOCK = WeightFormat(CodeType.E4M3, (128, 128), torch.float32)
CHANNEL = WeightFormat(CodeType.E4M3, (1, 0), torch.bfloat16)
TENSOR = WeightFormat(CodeType.E4M3, (0, 0), torch.float32)
ROWS_OF_BLOCKS = WeightFormat(CodeType.E4M3, (1, 128), torch.float8_e8m0fnu)
BY_GROUP, BY_TOKEN, BY_POWERS = ActivationScheme(), ActivationScheme(0), ActivationScheme(128, True)
SILU = Activation("silu")
GPT_OSS = Activation("silu", limit=0.7, alpha=1.702, beta=1.0)


def small_table(rows, swapped, columns=128):
    tile = Tile(rows, columns, 128, stages=2, warps=4, per_sm=1, group=2)
    height = Height(float("inf"), tile, replace(tile, columns=64), swapped)
    return CodeTable((height,), Vector(64, 256, 2, 4), Vector(128, 128, 2, 4), vector_tokens=0, exact=0)


TABLES = {
    "16 rows": small_table(16, True),
    "32 rows": small_table(32, False),
    "halves": small_table(32, False, 64),
    "vector": replace(small_table(16, True), vector_tokens=99),
}


@dataclass(frozen=True)
class Case:
    fmt: WeightFormat
    scheme: ActivationScheme | None
    machine: Machine = HOPPER
    hidden: int = 256
    width: int = 128
    activation: Activation = SILU
    bias: bool = False


CASES = {
    "block": Case(BLOCK, BY_GROUP),
    "ragged": Case(BLOCK, BY_POWERS, hidden=200, width=72, activation=GPT_OSS, bias=True),
    "no gate": Case(BLOCK, None, hidden=136, width=192, activation=Activation("relu2", gated=False)),
    "block, by token": Case(BLOCK, BY_TOKEN, hidden=300),
    "channel": Case(CHANNEL, BY_TOKEN, hidden=144, width=150, bias=True),
    "channel alone": Case(CHANNEL, None),
    "tensor": Case(TENSOR, BY_GROUP),
    "rows of blocks": Case(ROWS_OF_BLOCKS, BY_GROUP, width=160),
    "decoded": Case(BLOCK, BY_GROUP, AMPERE, width=192),
    "decoded alone": Case(BLOCK, None, AMPERE),
    "decoded channel": Case(CHANNEL, BY_TOKEN, AMPERE),
}
PAIRS = [
    *(("16 rows", name) for name in CASES),
    *(("32 rows", name) for name in ("ragged", "channel", "decoded")),
    *(("halves", name) for name in ("block", "no gate", "decoded alone")),
    *(("vector", name) for name in ("ragged", "no gate", "channel", "decoded")),
]


def draw_weight(fmt, rows, cols, g):
    grid = fmt.grid(rows, cols)
    codes = (torch.randn(rows, cols, generator=g) * 60).clamp(-448, 448).to(fmt.code.dtype)
    scales = ((torch.rand(grid, generator=g) + 0.5) / 60 / cols**0.5).to(fmt.scale)
    return QuantisedWeight(fmt, codes, scales, cols)


class Layer:
    """Random weights and inputs of one case: 5 experts, the last of them without slots."""

    draw = staticmethod(draw_weight)

    def __init__(self, case, g, tokens=11, top_k=2, row_invariant=False):
        e, h, i = 5, case.hidden, case.width
        self.spec = ExpertSpec(
            e, h, i, torch.bfloat16, case.activation, row_invariant=row_invariant, bias=case.bias,
            weight_format=case.fmt, activation_scheme=case.scheme,
        )  # fmt: skip
        self.machine = case.machine
        packed = case.activation.gate_up_rows(i)
        self.weights = [(self.draw(case.fmt, packed, h, g), self.draw(case.fmt, h, i, g)) for _ in range(e)]
        self.biases = [torch.randn(e, n, generator=g).bfloat16() for n in (packed, h) if case.bias]
        ids = torch.rand(tokens, e - 1, generator=g).topk(top_k).indices.to(torch.int32)
        ids[torch.rand(ids.shape, generator=g) < 0.2] = -1
        weights = torch.rand(tokens, top_k, generator=g)
        weights[ids < 0] = float("nan")
        hidden = torch.randn(tokens + 3, h, generator=g).bfloat16()
        hidden[:3] = float("nan")  # rows that no entry names
        rows = torch.randint(3, tokens + 3, (tokens,), generator=g)
        self.x = ExpertInput(hidden, ids, weights, rows)

    def kernel(self, table):
        kernel = QuantisedExperts(self.spec, table, self.machine)
        for e, (gate_up, down) in enumerate(self.weights):
            kernel.load_quantised(e, gate_up, down, *(b[e] for b in self.biases))
        return kernel

    def expected(self, compute):
        x = self.x
        out = torch.zeros(x.topk_ids.shape[0], self.spec.hidden_size)
        read = x.hidden_states[x.rows]
        for e, (gate_up, down) in enumerate(self.weights):
            token, slot = torch.where(x.topk_ids == e)
            dense = (gate_up.dequantise(), down.dequantise(), *(b[e] for b in self.biases))
            y = compute(read[token], self.spec.activation, *dense)
            out.index_add_(0, token, y * x.topk_weights[token, slot, None])
        return out

    def dequantised(self):
        return self.expected(mlp)

    def emulated(self, scheme):
        return self.expected(lambda *a: quantised_mlp(*a, scheme=scheme))


def error(got, expected):
    assert got.dtype == torch.bfloat16 and got.shape == expected.shape
    return float((got.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("table", "name"), PAIRS)
def test_equals_the_reference(table, name, g):
    """Quantised activations: near the dequantised reference, and nearly equal to the emulation."""
    case = CASES[name]
    layer = Layer(case, g)
    got = layer.kernel(TABLES[table]).compute(layer.x)
    if case.scheme is None or table == "vector":
        assert error(got, layer.dequantised()) < 6e-3
    else:
        assert error(got, layer.dequantised()) < 6e-2
        assert error(got, layer.emulated(case.scheme)) < 4e-3


def test_rows_do_not_depend_on_the_batch(g):
    """Exact mode leaves activations as they are, even where the layer has a scheme."""
    layer = Layer(CASES["block"], g, tokens=40, row_invariant=True)
    kernel = layer.kernel(TABLES["vector"])
    whole, x = kernel.compute(layer.x), layer.x
    assert error(whole, layer.dequantised()) < 6e-3
    for size in (1, 9):
        pick = torch.randperm(40, generator=g)[:size]
        part = ExpertInput(x.hidden_states, x.topk_ids[pick], x.topk_weights[pick], x.rows[pick])
        assert torch.equal(kernel.compute(part), whole[pick])


def test_wrong_weights_are_refused(g):
    layer = Layer(CASES["block"], g)
    kernel = QuantisedExperts(layer.spec, TABLES["16 rows"], HOPPER)
    with pytest.raises(RuntimeError, match="expert 0 has tokens but no weights"):
        kernel.compute(layer.x)
    with pytest.raises(
        ValueError, match="gate_up is in plain numbers, the kernel was built for e4m3 128x128"
    ):
        kernel.load_expert(0, torch.zeros(256, 256), torch.zeros(256, 128))
    other = draw_weight(CHANNEL, 256, 256, g), draw_weight(CHANNEL, 256, 128, g)
    with pytest.raises(ValueError, match="gate_up is in e4m3 1xall, the kernel was built for e4m3 128x128"):
        kernel.load_quantised(0, *other)

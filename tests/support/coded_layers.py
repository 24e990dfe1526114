"""Small layers of codes for the tests of GPU kernels: weights, inputs, tables and both references.

Import Triton's interpreter, or none, before.
"""

from dataclasses import dataclass, replace

import torch

from xpar.kernels.contracts import Activation, ExpertInput, ExpertSpec
from xpar.kernels.gpu.code_tables import CodeTable, Height
from xpar.kernels.gpu.quantised_experts import QuantisedExperts
from xpar.kernels.gpu.tile_tables import Machine, Tile, Vector
from xpar.kernels.quantised_rows import quantised_mlp
from xpar.kernels.quantised_weight import ActivationScheme, QuantisedWeight, WeightFormat
from xpar.kernels.reference import mlp

HOPPER, AMPERE = Machine(sms=3, capability=(9, 0)), Machine(sms=3, capability=(8, 0))
SILU = Activation("silu")
GPT_OSS = Activation("silu", limit=0.7, alpha=1.702, beta=1.0)


def small_table(rows, swapped, columns=128):
    tile = Tile(rows, columns, 128, stages=2, warps=4, per_sm=1, group=2)
    height = Height(float("inf"), tile, replace(tile, columns=64), swapped)
    return CodeTable((height,), Vector(64, 256, 2, 4), Vector(128, 128, 2, 4), vector_tokens=0, exact=0)


def decoded_table(rows):
    """Return a table whose batches all take weights that become bfloat16, where the format has that."""
    tile = Tile(rows, 64, 128, stages=2, warps=4, per_sm=1, group=2)
    plain = small_table(16, True)
    return replace(plain, heights=(Height(99.0, tile, tile, True, decoded=True), *plain.heights), exact=1)


@dataclass(frozen=True)
class Case:
    fmt: WeightFormat
    scheme: ActivationScheme | None
    machine: Machine = HOPPER
    hidden: int = 256
    width: int = 128
    activation: Activation = SILU
    bias: bool = False


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
        kernel = QuantisedExperts(self.spec, table, self.machine, has_asm=False)
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

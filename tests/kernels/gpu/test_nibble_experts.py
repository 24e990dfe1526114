"""The Triton experts of int4 and e2m1 nibbles against the reference, in the interpreter."""

from dataclasses import replace

import pytest
import torch
from coded_layers import AMPERE, GPT_OSS, HOPPER, Case, Layer, decoded_table, error, small_table

from xpar.kernels.contracts import Activation, ExpertInput
from xpar.kernels.gpu.nibble_experts import NibbleExperts
from xpar.kernels.quantised_weight import CodeType, QuantisedWeight, WeightFormat

INT4, E2M1 = CodeType.INT4, CodeType.E2M1
CASES = {
    "mxfp4": Case(WeightFormat(E2M1, (1, 32), torch.float8_e8m0fnu), None, HOPPER, 200, 72, GPT_OSS, True),
    "nvfp4": Case(WeightFormat(E2M1, (1, 16), torch.float8_e4m3fn, global_scale=True), None, hidden=144),
    "int4 by 32": Case(WeightFormat(INT4, (1, 32), torch.bfloat16), None, width=96),
    "int4 by 64": Case(WeightFormat(INT4, (1, 64), torch.float16, zero_point=True), None, hidden=192),
    "int4 by 128": Case(WeightFormat(INT4, (1, 128), torch.float32), None, hidden=130, width=144),
    "zero points": Case(WeightFormat(INT4, (1, 128), torch.bfloat16, zero_point=True), None),
    "channel": Case(
        WeightFormat(INT4, (1, 0), torch.float16), None, activation=Activation("relu2", gated=False)
    ),
    "decoded": Case(WeightFormat(E2M1, (1, 32), torch.float8_e8m0fnu), None, AMPERE),
    "decoded int4": Case(WeightFormat(INT4, (1, 32), torch.float16, zero_point=True), None, AMPERE),
}
TABLES = {
    "sorted": small_table(16, True),
    "decoded": decoded_table(16),
    "vector": replace(small_table(16, True), vector_tokens=99),
}


def draw_nibbles(fmt, rows, cols, g):
    """Any nibbles; scales in several octaves where they are powers of two."""
    grid, spread = fmt.grid(rows, cols), 3.0 if fmt.code is E2M1 else 5.0
    scales = torch.exp2(torch.randn(grid, generator=g)) / spread / cols**0.5
    return QuantisedWeight(
        fmt,
        torch.randint(0, 256, fmt.code_shape(rows, cols), generator=g, dtype=torch.uint8),
        (scales * 20 if fmt.global_scale else scales).to(fmt.scale),
        cols,
        torch.randint(0, 16, grid, generator=g, dtype=torch.uint8) if fmt.zero_point else None,
        torch.tensor(0.05) * (1 + torch.rand((), generator=g)) if fmt.global_scale else None,
    )


class NibbleLayer(Layer):
    draw = staticmethod(draw_nibbles)

    def kernel(self, table):
        kernel = NibbleExperts(self.spec, table, self.machine, has_asm=False)
        for e, (gate_up, down) in enumerate(self.weights):
            kernel.load_quantised(e, gate_up, down, *(b[e] for b in self.biases))
        return kernel


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name, table, g):
    layer = NibbleLayer(CASES[name], g, tokens=7)
    assert error(layer.kernel(TABLES[table]).compute(layer.x), layer.dequantised()) < 6e-3


def test_rows_do_not_depend_on_the_batch(g):
    layer = NibbleLayer(CASES["int4 by 32"], g, tokens=20, row_invariant=True)
    kernel = layer.kernel(TABLES["vector"])
    whole, x = kernel.compute(layer.x), layer.x
    for size in (1, 7):
        pick = torch.randperm(20, generator=g)[:size]
        part = ExpertInput(x.hidden_states, x.topk_ids[pick], x.topk_weights[pick], x.rows[pick])
        assert torch.equal(kernel.compute(part), whole[pick])


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**20])
def test_integers_follow_the_size_of_the_activations(factor, g):
    """The vector products make integers of activations: their scale goes with the largest of a run."""
    layer = NibbleLayer(CASES["mxfp4"], g, tokens=3)
    layer.x = replace(layer.x, hidden_states=layer.x.hidden_states * factor)
    assert error(layer.kernel(TABLES["vector"]).compute(layer.x), layer.dequantised()) < 6e-3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("table", ["vector", "decoded"])
def test_a_value_that_is_no_number_shows(table, value, g):
    layer = NibbleLayer(CASES["int4 by 32"], g, tokens=6)
    x = layer.x
    hidden, ids = x.hidden_states.clone(), x.topk_ids.clone()
    ids[0] = torch.tensor([0, 1], dtype=torch.int32)
    x = replace(x, topk_ids=ids, rows=torch.arange(3, 9), topk_weights=torch.full(ids.shape, 0.5))
    hidden[3, 5] = value
    got = layer.kernel(TABLES[table]).compute(replace(x, hidden_states=hidden))
    assert not got[0].isfinite().any() and got[1:].isfinite().all()

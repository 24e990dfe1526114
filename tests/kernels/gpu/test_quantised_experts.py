"""The Triton experts of e4m3 codes against the reference and its emulation, in the interpreter."""

from dataclasses import replace

import pytest
import torch
from coded_layers import (
    AMPERE,
    GPT_OSS,
    HOPPER,
    Case,
    Layer,
    decoded_table,
    draw_weight,
    error,
    small_table,
)

from xpar.kernels.contracts import Activation, ExpertInput
from xpar.kernels.gpu.quantised_experts import QuantisedExperts
from xpar.kernels.quantised_weight import ActivationScheme, CodeType, WeightFormat

BLOCK = WeightFormat(CodeType.E4M3, (128, 128), torch.float32)
CHANNEL = WeightFormat(CodeType.E4M3, (1, 0), torch.bfloat16)
TENSOR = WeightFormat(CodeType.E4M3, (0, 0), torch.float32)
ROWS_OF_BLOCKS = WeightFormat(CodeType.E4M3, (1, 128), torch.float8_e8m0fnu)
BY_GROUP, BY_TOKEN, BY_POWERS = ActivationScheme(), ActivationScheme(0), ActivationScheme(128, True)


TABLES = {
    "16 rows": small_table(16, True),
    "32 rows": small_table(32, False),
    "halves": small_table(32, False, 64),
    "bfloat16": decoded_table(16),
    "vector": replace(small_table(16, True), vector_tokens=99),
}


CASES = {
    "block": Case(BLOCK, BY_GROUP),
    "ragged": Case(BLOCK, BY_POWERS, hidden=200, width=72, activation=GPT_OSS, bias=True),
    "no gate": Case(BLOCK, None, hidden=136, width=192, activation=Activation("relu2", gated=False)),
    "block, by token": Case(BLOCK, BY_TOKEN, hidden=300),
    "channel": Case(CHANNEL, BY_TOKEN, hidden=144, width=150, bias=True),
    "channel alone": Case(CHANNEL, None),
    "ragged alone": Case(BLOCK, None, hidden=200, width=72, activation=GPT_OSS, bias=True),
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
    *(("bfloat16", name) for name in ("no gate", "channel alone", "ragged alone")),
    *(("vector", name) for name in ("ragged", "no gate", "channel", "decoded")),
]


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

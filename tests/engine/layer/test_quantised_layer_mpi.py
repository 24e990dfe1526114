"""A layer of quantised experts equals that of its dequantised weights, kept packed or converted."""

import logging
from typing import TYPE_CHECKING

import pytest
import torch

from xpar.comm import ProcessGrid, World
from xpar.engine.layer.build import build_layer
from xpar.engine.layer.expert_shard import pick_kernel
from xpar.engine.layer.options import LayerOptions
from xpar.engine.layer.reference import relative_error
from xpar.engine.layer.runner import MoERunner
from xpar.engine.synthetic.layer import SyntheticLayer
from xpar.engine.synthetic.shapes import shape_of
from xpar.kernels.cpu import quantised_library
from xpar.kernels.quantisation import NAMED_FORMATS

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

REASON = quantised_library.why_unavailable()
pytestmark = [
    pytest.mark.mpi(max_size=3, deadline=120),
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]
TOKENS = 13
BAR = 6e-3
"""The relative error of a layer that computes from exact codes with bfloat16 rows and float32 sums."""


@pytest.fixture(scope="module")
def grid(comm: "Intracomm") -> ProcessGrid:
    return ProcessGrid.create(World.attach(comm))


def build(
    grid: ProcessGrid, shape: str, name: str, seed: int, options: LayerOptions
) -> tuple[SyntheticLayer, MoERunner]:
    config = shape_of(shape).layer(0.0625)
    weights = SyntheticLayer(config, torch.bfloat16, seed, NAMED_FORMATS[name])
    runner = build_layer(
        config, grid, torch.bfloat16, weights.read, options, weight_format=NAMED_FORMATS[name]
    )
    return weights, runner


def error_of(weights: SyntheticLayer, runner: MoERunner, seed: int) -> float:
    x = torch.randn(TOKENS, runner.config.hidden_size, generator=torch.Generator().manual_seed(seed))
    x = x.bfloat16()
    expected, _ = weights.reference(x)
    return relative_error(runner(x), expected)


@pytest.mark.parametrize("exact", [False, True], ids=["", "exact"])
@pytest.mark.parametrize("shape", ["olmoe", "gpt-oss-20b", "deepseek-v2-lite"])
@pytest.mark.parametrize("name", NAMED_FORMATS)
def test_a_layer_keeps_its_weights_quantised(
    grid: ProcessGrid, name: str, shape: str, exact: bool, fresh_seed: int
) -> None:
    weights, runner = build(grid, shape, name, fresh_seed, LayerOptions(exact=exact))
    assert runner.experts.weight_format == NAMED_FORMATS[name]
    assert runner.experts.kernel_name == "native-quantised"
    assert error_of(weights, runner, fresh_seed) <= BAR


def test_a_kernel_without_the_format_gets_converted_weights(
    grid: ProcessGrid, fresh_seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="xpar.build"):
        weights, runner = build(grid, "olmoe", "int4", fresh_seed, LayerOptions(kernel="onednn"))
    assert runner.experts.weight_format is None
    (line,) = [record.getMessage() for record in caplog.records if "converted" in record.getMessage()]
    assert line.startswith(f"int4 1x128 weights of {len(runner.experts.experts)} experts are converted to ")
    assert "bfloat16 for onednn" in line and "kernel onednn was asked for" in line
    assert error_of(weights, runner, fresh_seed) <= 1e-2


def test_reasons_name_the_format(grid: ProcessGrid) -> None:
    config, fmt = shape_of("olmoe").layer(0.0625), NAMED_FORMATS["fp8"]
    quantised = pick_kernel(config, grid, 4, torch.bfloat16, "auto", False, fmt)
    assert quantised.name == "native-quantised"
    assert dict(quantised.rejected)["onednn"] == "does not compute from e4m3 128x128 weights"
    converted = pick_kernel(config, grid, 4, torch.float32, "auto", False, fmt)
    assert converted.name == "onednn"
    assert "in bfloat16, not in float32" in dict(converted.rejected)["native-quantised"]

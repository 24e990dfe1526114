"""Rows that travel as codes give the bits of rows that are quantised after they have travelled."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from all_dispatchers import all_dispatchers
from torch import Tensor

from xpar.comm import ProcessGrid, World
from xpar.engine.config import StoredActivations
from xpar.engine.layer.build import build_layer
from xpar.engine.layer.options import LayerOptions
from xpar.engine.layer.runner import MoERunner
from xpar.engine.synthetic.layer import SyntheticLayer
from xpar.engine.synthetic.shapes import shape_of
from xpar.kernels.quantisation import NAMED_FORMATS
from xpar.kernels.quantised_weight import ActivationScheme

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi(deadline=120)
SCHEMES = {
    "by-128": ActivationScheme(),
    "by-128-powers": ActivationScheme(128, True),
    "by-token": ActivationScheme(0),
}


@pytest.fixture(scope="module")
def grid(comm: "Intracomm") -> ProcessGrid:
    return ProcessGrid.create(World.attach(comm))


def build(
    grid: ProcessGrid, scheme: ActivationScheme, seed: int, shape: str = "olmoe", **options: Any
) -> tuple[SyntheticLayer, MoERunner]:
    config = replace(shape_of(shape).layer(0.0625), activations=StoredActivations(scheme))
    fmt = NAMED_FORMATS["fp8"]
    weights = SyntheticLayer(config, torch.bfloat16, seed, fmt)
    chosen = LayerOptions(activations="quantised", **options)
    runner = build_layer(config, grid, torch.bfloat16, weights.read, chosen, weight_format=fmt)
    return weights, runner


def quantised_on_arrival(runner: MoERunner) -> MoERunner:
    """Let rows travel as they are, and the kernel quantise what arrives."""
    runner.dispatcher.row_bytes = None
    runner.experts = replace(runner.experts, row_format=None)
    return runner


def own_tokens(grid: ProcessGrid, hidden: int, seed: int) -> Tensor:
    """Draw tokens: more on every rank, none on the second."""
    count = 0 if grid.world.rank == 1 else 3 + 4 * grid.world.rank
    generator = torch.Generator().manual_seed(seed + grid.world.rank)
    return torch.randn(count, hidden, generator=generator).bfloat16()


@pytest.mark.parametrize("name", all_dispatchers(deadline=120))
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_codes_give_the_bits_of_rows_that_are_quantised_on_arrival(
    grid: ProcessGrid, scheme: ActivationScheme, name: str, fresh_seed: int
) -> None:
    _, runner = build(grid, scheme, fresh_seed, kernel="reference", dispatcher=name)
    assert runner.experts.row_bytes == runner.dispatcher.row_bytes
    x = own_tokens(grid, runner.config.hidden_size, fresh_seed)
    travelled = runner(x)
    assert torch.equal(travelled, quantised_on_arrival(runner)(x))
    assert travelled.shape == x.shape

"""Data-parallel ranks with different numbers of batches take every step together, the idle ones with no
tokens."""

from typing import TYPE_CHECKING

import pytest
import torch

from xpar.comm import ProcessGrid, World, agree_step
from xpar.engine.config import LayerConfig, RouterConfig
from xpar.engine.layer.build import build_layer
from xpar.engine.layer.options import LayerOptions
from xpar.engine.synthetic.layer import SyntheticLayer

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def world(comm: "Intracomm") -> World:
    return World.attach(comm)


def test_idle_ranks_join_until_nobody_has_work(world: World, fresh_seed: int) -> None:
    """Batches of uneven numbers of steps, through a layer whose experts are spread over all ranks."""
    config = LayerConfig(5, 16, 12, RouterConfig(2))
    layer = SyntheticLayer(config, torch.float32, fresh_seed)
    grid = ProcessGrid.create(world)
    runner = build_layer(config, grid, torch.float32, layer.read, LayerOptions("alltoall"))
    generator = torch.Generator().manual_seed(fresh_seed + world.rank)
    batches = [torch.randn(n + 1, 16, generator=generator) for n in range(2 * world.rank)]
    steps = 0
    while True:
        mine = batches[0] if batches else torch.empty(0, 16)
        facts = agree_step(grid.dp, steps, tokens=mine.shape[0], work=len(batches))
        if not facts.any_work:
            break
        assert max(facts.tokens) == (steps + 1 if world.size > 1 else 1)
        torch.testing.assert_close(runner(mine), layer.reference(mine)[0], rtol=1e-4, atol=1e-5)
        batches, steps = batches[1:], steps + 1
    assert steps == 2 * (world.size - 1)

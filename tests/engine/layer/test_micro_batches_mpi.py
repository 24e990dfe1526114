"""A step in parts computes what the whole step does, and one part's rows are on their way while another is
computed."""

from typing import TYPE_CHECKING

import pytest
import torch

from xpar.comm import ProcessGrid, RemoteRankError, World
from xpar.engine.config import LayerConfig, RouterConfig, SharedConfig
from xpar.engine.layer.build import build_layer
from xpar.engine.layer.micro_batches import MicroBatches
from xpar.engine.layer.options import LayerOptions
from xpar.engine.synthetic.layer import SyntheticLayer

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi
CONFIG = LayerConfig(6, 32, 24, RouterConfig(2), shared=SharedConfig(20, gated=True))
TOKENS = (7, 0, 1, 12)


@pytest.fixture(scope="module")
def world(comm: "Intracomm") -> World:
    return World.attach(comm)


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("axis", ["dp", "tp"])
@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_equals_the_whole_step(
    world: World, fresh_seed: int, count: int, dispatcher: str, axis: str, exact: bool
) -> None:
    layer = SyntheticLayer(CONFIG, torch.float32, fresh_seed)
    grid = ProcessGrid.create(world, **{axis: world.size})
    options = LayerOptions(dispatcher, exact=exact)
    runner = build_layer(CONFIG, grid, torch.float32, layer.read, options)
    me = grid.dp.rank
    x = torch.randn(TOKENS[me], 32, generator=torch.Generator().manual_seed(fresh_seed + me))
    logits = torch.randn(TOKENS[me], 6, generator=torch.Generator().manual_seed(fresh_seed + me))
    parts = MicroBatches(runner, count)
    for given in (None, logits):
        whole, pieces = runner(x, given), parts(x, given)
        if exact:
            assert torch.equal(pieces, whole)
        else:
            torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-5)


def test_the_next_part_leaves_before_this_one_is_computed(world: World) -> None:
    layer = SyntheticLayer(CONFIG, torch.float32, 0)
    grid = ProcessGrid.create(world)
    runner = build_layer(CONFIG, grid, torch.float32, layer.read, LayerOptions("alltoall"))
    events: list[str] = []
    dispatch, combine = runner.dispatcher.dispatch, runner.dispatcher.combine
    runner.dispatcher.dispatch = lambda *a: (events.append("dispatch"), dispatch(*a))[1]  # type: ignore
    runner.dispatcher.combine = lambda *a: (events.append("combine"), combine(*a))[1]  # type: ignore
    MicroBatches(runner, 3)(torch.zeros(5, 32))
    assert events == ["dispatch", "dispatch", "combine", "dispatch", "combine", "combine"]


def test_a_failure_in_a_later_part_is_one_error_everywhere(world: World) -> None:
    layer = SyntheticLayer(CONFIG, torch.float32, 0)
    grid = ProcessGrid.create(world)
    runner = build_layer(CONFIG, grid, torch.float32, layer.read, LayerOptions("alltoall"))
    logits = torch.zeros(4, 6)
    if world.rank == world.size - 1:
        logits[3] = float("nan")
    combined: list[int] = []
    combine = runner.dispatcher.combine
    runner.dispatcher.combine = lambda *a: (combined.append(1), combine(*a))[1]  # type: ignore
    parts = MicroBatches(runner, 2)
    with pytest.raises(RemoteRankError, match=r"router logits of token 1 are not finite"):
        parts(torch.zeros(4, 32), logits)
    assert combined == [1]  # the first part's rows were not left in flight
    assert torch.isfinite(parts(torch.zeros(4, 32))).all()


def test_what_cannot_be_split(world: World) -> None:
    layer = SyntheticLayer(CONFIG, torch.float32, 0)
    grid = ProcessGrid.create(world)
    runner = build_layer(CONFIG, grid, torch.float32, layer.read, LayerOptions("shared-memory"))
    with pytest.raises(ValueError, match="shared-memory holds one step's rows at a time"):
        MicroBatches(runner, 2)
    with pytest.raises(ValueError, match="count=0: a step has at least 1 part"):
        MicroBatches(runner, 0)

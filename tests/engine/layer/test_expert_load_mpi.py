"""What is observed of a layer: where every token went, how many each expert got, how many rows moved."""

from collections import Counter
from typing import TYPE_CHECKING

import pytest
import torch

from xpar.comm import ProcessGrid, World
from xpar.comm.reduction import split_tokens
from xpar.engine.config import LayerConfig, RouterConfig
from xpar.engine.layer.build import build_layer
from xpar.engine.layer.observers import Observers
from xpar.engine.layer.options import LayerOptions
from xpar.engine.routing import FunctionRule
from xpar.engine.synthetic.layer import SyntheticLayer

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi
EXPERTS, HIDDEN, TOKENS = 6, 16, 9
CONFIG = LayerConfig(EXPERTS, HIDDEN, 12, RouterConfig(2))
ZERO = LayerConfig(EXPERTS, HIDDEN, 12, RouterConfig(3, zero_experts=2))
WAYS = {
    "copies": ("tp", LayerOptions("replicated")),
    "shared out": ("tp", LayerOptions("alltoall")),
    "sequence parallel": ("tp", LayerOptions("allgather", sequence_parallel=True)),
    "data parallel": ("dp", LayerOptions("alltoall")),
}


@pytest.fixture(scope="module")
def world(comm: "Intracomm") -> World:
    return World.attach(comm)


@pytest.mark.parametrize("config", [CONFIG, ZERO], ids=["plain", "identity experts"])
@pytest.mark.parametrize("way", WAYS)
def test_routing_and_load_are_those_of_every_token_once(
    world: World, fresh_seed: int, way: str, config: LayerConfig
) -> None:
    axis, options = WAYS[way]
    grid = ProcessGrid.create(world, **{axis: world.size})
    everyone = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(fresh_seed))
    if way in ("sequence parallel", "data parallel"):
        everyone = split_tokens(everyone, world.comm).tensor
    layer = SyntheticLayer(config, torch.float32, fresh_seed)
    runner = build_layer(config, grid, torch.float32, layer.read, options)
    runner(everyone)  # before anybody counts
    counter = runner.make_load_counter()
    counted = Observers(load=counter)
    expected = layer.make_router().route(everyone)
    output, routing = runner.forward_with_routing(everyone, observers=counted)
    assert torch.equal(output, runner(everyone, observers=counted))
    assert torch.equal(routing.topk_ids, expected.topk_ids)
    torch.testing.assert_close(routing.topk_weights, expected.topk_weights)
    assert (routing.identity_weights is None) == (config.router.zero_experts == 0)
    if routing.identity_weights is not None:
        torch.testing.assert_close(routing.identity_weights, expected.identity_weights)
    mine = Counter(expected.topk_ids[expected.topk_ids >= 0].tolist())
    everyones = world.comm.all_gather_object(mine) if len(everyone) < TOKENS else [mine]
    total = sum(everyones, Counter())
    load = counter.read()
    assert load.steps == 2
    assert load.per_expert == tuple(2 * total[e] for e in range(EXPERTS))
    assert sum(load.per_rank) == sum(load.per_expert)
    assert load.expert_imbalance == max(load.per_expert) * EXPERTS / sum(load.per_expert)
    assert counter.read().steps == 0 and sum(counter.read().per_expert) == 0


def test_rows_and_imbalance_of_a_load_that_one_expert_has(world: World) -> None:
    layer = SyntheticLayer(CONFIG, torch.float32, 0)
    options = LayerOptions("alltoall")
    runner = build_layer(CONFIG, ProcessGrid.create(world), torch.float32, layer.read, options)
    tokens = world.rank + 1
    to_first = FunctionRule(
        lambda *_: (torch.zeros(tokens, 1, dtype=torch.int32), torch.ones(tokens, 1)), EXPERTS, 1
    )
    counter = runner.make_load_counter()
    runner(torch.zeros(tokens, HIDDEN), router=to_first, observers=Observers(load=counter))
    load = counter.read()
    total = world.size * (world.size + 1) // 2
    assert load.per_rank == (total, *[0] * (world.size - 1))
    assert (load.expert_imbalance, load.rank_imbalance) == (EXPERTS, world.size)
    assert (load.rows, load.remote_rows, load.combined_rows) == (total, total - 1, total)


def test_nothing_at_all_is_even(world: World) -> None:
    layer = SyntheticLayer(CONFIG, torch.float32, 0)
    runner = build_layer(CONFIG, ProcessGrid.create(world), torch.float32, layer.read)
    counter = runner.make_load_counter()
    runner(torch.zeros(0, HIDDEN), observers=Observers(load=counter))
    load = counter.read()
    assert (load.expert_imbalance, load.rank_imbalance, load.rows) == (1.0, 1.0, 0)

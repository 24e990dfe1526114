"""The first ranks of a world as a world: its facts, its groups, and closing them."""

from typing import TYPE_CHECKING

import pytest
import torch

from xpar.comm import ProcessGrid, World
from xpar.comm.shared_window import get_window

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def world(comm: "Intracomm") -> World:
    return World.attach(comm)


def test_the_first_ranks_are_a_world(world: World) -> None:
    for ranks in range(1, world.size + 1):
        first = world.first(ranks)
        assert (first is None) == (world.rank >= ranks)
        if first is not None:
            assert (first.rank, first.size) == (world.rank, ranks)
            assert first.comm.all_gather_object(world.rank) == list(range(ranks))
            assert first.node_of == world.node_of[:ranks] and first.node == world.node
            assert first.num_nodes == len(set(world.node_of[:ranks])) and first.hosts == world.hosts[:ranks]
            assert first.local_rank == world.local_rank
            assert first.local_size == sum(node == world.node for node in world.node_of[:ranks])
            assert first.threads() == world.threads()
            first.comm.close()
        world.comm.barrier(patient=True)


def test_a_grid_on_them_is_given_back_with_its_windows(world: World) -> None:
    for ranks in range(1, world.size + 1):
        first = world.first(ranks)
        if first is not None:
            grid = ProcessGrid.create(first)
            assert grid.moe.all_reduce(torch.ones(3)).tolist() == [ranks] * 3
            window = get_window(grid.node)
            window.reserve(1000)
            window.view(0, (1, 1000), torch.uint8).fill_(1)
            window.fence()
            grid.close()
            assert grid.node.size == 1 or window.view(0, (1, 0), torch.uint8).untyped_storage().nbytes() == 0
            first.comm.close()
        world.comm.barrier(patient=True)


def test_other_numbers_are_refused_before_anything_is_sent(world: World) -> None:
    for ranks in (0, world.size + 1):
        with pytest.raises(ValueError, match=rf"first {ranks} ranks: this one has {world.size}; take 1 to"):
            world.first(ranks)

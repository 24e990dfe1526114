"""Ranks on several nodes: their order, groups, windows, and the dispatcher chosen.

Runs where MPI sees several nodes, real ones or ``mpirun -hosts a:2,b:1`` on one machine;
``MPIR_CVAR_NUM_CLIQUES=2`` deals the ranks to two nodes in turn, so that MPI's order is not the order of the
nodes.
"""

from typing import TYPE_CHECKING

import pytest
import torch
from all_dispatchers import fitting

from xpar.comm import ProcessGrid, World
from xpar.comm.dispatch.choose import choose_dispatcher
from xpar.comm.placement import Placement
from xpar.comm.shared_window import SharedWindow, get_window

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi(min_nodes=2)


@pytest.fixture(scope="module")
def world(comm: "Intracomm") -> World:
    return World.attach(comm)


@pytest.fixture(scope="module")
def grid(world: World) -> ProcessGrid:
    return ProcessGrid.create(world)


@pytest.fixture(scope="module")
def neighbours(comm: "Intracomm") -> list[set[int]]:
    """Ask MPI, in another way than World does, for the ranks of every rank's node."""
    from mpi4py import MPI

    with_memory = comm.Split_type(MPI.COMM_TYPE_SHARED)
    mine = set(MPI.Group.Translate_ranks(with_memory.group, list(range(with_memory.size)), comm.group))
    with_memory.Free()
    return comm.allgather(mine)


def test_ranks_are_ordered_node_by_node(comm: "Intracomm", world: World, neighbours: list[set[int]]) -> None:
    """Nodes one after the other, in the order of their first rank; within each, in MPI's order."""
    before = comm.allgather(comm.rank)
    order = world.comm.all_gather_object(comm.rank)
    assert sorted(order) == before
    nodes = sorted({tuple(sorted(n)) for n in neighbours})
    assert order == [rank for node in nodes for rank in node]
    assert world.node_of == tuple(i for i, node in enumerate(nodes) for _ in node)
    assert world.num_nodes == len(nodes)


def test_local_rank_is_the_place_among_those_that_share_memory(
    comm: "Intracomm", world: World, neighbours: list[set[int]]
) -> None:
    mine = sorted(neighbours[comm.rank])
    assert (world.local_rank, world.local_size) == (mine.index(comm.rank), len(mine))
    first = world.node_of.index(world.node)
    assert world.rank == first + world.local_rank


def test_node_group_is_the_node(comm: "Intracomm", grid: ProcessGrid, neighbours: list[set[int]]) -> None:
    assert set(grid.node.all_gather_object(comm.rank)) == neighbours[comm.rank]
    assert (grid.node.rank, grid.node.size) == (grid.world.local_rank, grid.world.local_size)


def test_consecutive_ranks_stay_inside_a_node(world: World) -> None:
    """Groups of consecutive ranks, which talk most, cross no nodes if sizes allow it."""
    sizes = [world.node_of.count(node) for node in range(world.num_nodes)]
    if len(set(sizes)) > 1 or sizes[0] == 1:
        sizes = [1] * world.size  # uneven nodes: only groups of one fit everywhere
    grid = ProcessGrid.create(world, tp=sizes[0], ep=world.size // sizes[0], etp=sizes[0])
    for group in (grid.tp, grid.etp):
        assert len({world.node_of[r] for r in group.world_ranks}) == 1


def test_every_node_has_a_window_of_its_own(grid: ProcessGrid) -> None:
    """A rank's writes are seen by its node alone; twice, as a window that grows is new."""
    group = grid.node
    window = SharedWindow(group)
    for rows in (3, 5000):
        window.reserve(rows * group.size * 8)
        mine = window.view(group.rank * rows * 8, (rows, 1), torch.int64)
        mine.fill_(1000 * grid.world.node + group.rank)
        grid.world.comm.barrier()
        window.fence()
        everyone = window.view(0, (rows * group.size, 1), torch.int64)[:, 0].tolist()
        assert everyone == [1000 * grid.world.node + r for r in range(group.size) for _ in range(rows)]
        window.fence()
    window.close()
    assert get_window(group) is not get_window(grid.moe)


def test_auto_does_not_share_memory_across_nodes(grid: ProcessGrid) -> None:
    placement = Placement.blocks(8, grid.shape.ep)
    choice = choose_dispatcher(grid, placement)
    assert choice.dispatcher.name in fitting(grid.world.num_nodes)
    assert f"lie on {grid.world.num_nodes} nodes and share no memory" in choice.explain()
    with pytest.raises(ValueError, match=r"share no memory; choose auto or one of"):
        choose_dispatcher(grid, placement, "shared-memory")


def test_auto_sends_a_row_a_node_where_that_is_fewer(grid: ProcessGrid) -> None:
    """It is fewer wherever two ranks of a group share a node and a token has two experts."""
    placement, alone = Placement.blocks(8, grid.shape.ep), grid.moe.size == grid.world.num_nodes
    choice = choose_dispatcher(grid, placement, top_k=3)
    assert (choice.dispatcher.name == "hierarchical") == (not alone), choice.explain()
    one = choose_dispatcher(grid, placement, top_k=1)
    assert one.dispatcher.name != "hierarchical"
    assert "hierarchical: passed over, a token sends " in one.explain()


@pytest.mark.mpi(min_nodes=2, min_size=4, max_size=4)
def test_slices_of_an_expert_on_two_nodes_are_refused(world: World) -> None:
    grid = ProcessGrid.create(world, etp=4)
    with pytest.raises(ValueError, match="etp=4: ranks 0 to 3 of an expert group slice the same experts"):
        choose_dispatcher(grid, Placement.blocks(8, 1, 4), "hierarchical")


@pytest.mark.mpi(min_nodes=2, min_size=4, max_size=4)
def test_expert_groups_of_one_node_share_memory(world: World) -> None:
    """Of groups of two ranks, auto lets those share memory that lie on one node, and no other."""
    grid = ProcessGrid.create(world, ep=2)
    same_node = len({world.node_of[r] for r in grid.moe.world_ranks}) == 1
    choice = choose_dispatcher(grid, Placement.blocks(8, 2))
    assert (choice.dispatcher.name == "shared-memory") == same_node, choice.explain()

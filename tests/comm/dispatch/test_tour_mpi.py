"""The row that docs/tour.md follows through the shared-memory dispatcher goes the way that the page says."""

from typing import TYPE_CHECKING

import pytest
import torch

from xpar.comm import ProcessGrid, World
from xpar.comm.communicator import Tag
from xpar.comm.dispatch.shared_memory import SharedMemoryDispatcher
from xpar.comm.placement import Placement
from xpar.comm.reduction import Full
from xpar.kernels.contracts import Routing

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi(min_size=4, max_size=4, max_nodes=1)
WIDTH = 8


def test_the_row_of_the_tour(comm: "Intracomm") -> None:
    """Token 0 of rank 1 goes to expert 3 (weight 0.7) and to expert 6 (0.3); all others go nowhere."""
    grid = ProcessGrid.create(World.attach(comm))
    mover = SharedMemoryDispatcher(grid.moe, Placement.blocks(8, 4))
    ids = torch.full((2, 2), -1, dtype=torch.int32)
    x = torch.full((2, WIDTH), float(comm.rank))
    if comm.rank == 1:
        ids[0], x[0] = torch.tensor([3, 6]), 10.0
    routing = Routing(ids, torch.tensor([[0.7, 0.3]]).repeat(2, 1))
    plan = mover.plan(routing, tag=Tag("layer", 0, 1), hidden_size=WIDTH, dtype=x.dtype)
    arrived = mover.dispatch(x, plan).wait()
    assert arrived.rows is not None
    expected = {1: [[1, -1]], 3: [[-1, 0]]}.get(comm.rank, [])
    assert arrived.topk_ids.tolist() == expected and arrived.rows.tolist() == [2] * len(expected)
    assert all((arrived.hidden_states[row] == 10.0).all() for row in arrived.rows)
    # Expert 3 multiplies by 100, expert 6 by 1000.
    output = {1: 0.7 * 100.0, 3: 0.3 * 1000.0}.get(comm.rank, 0.0) * arrived.hidden_states[arrived.rows]
    result = mover.combine(output, plan).wait()
    assert result.state == Full()
    home = torch.zeros(2, WIDTH)
    if comm.rank == 1:
        home[0] = 10.0 * (0.7 * 100.0 + 0.3 * 1000.0)
    torch.testing.assert_close(result.tensor, home)

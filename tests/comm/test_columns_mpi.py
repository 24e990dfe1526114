"""Products that the ranks of a node share out, on 1 to 4 ranks, some without rows and some without columns."""

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from xpar.comm import columns
from xpar.comm.columns import SharedColumns, columns_of
from xpar.comm.grid import ProcessGrid
from xpar.comm.handshake import DesyncError, Tag
from xpar.comm.world import World

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def grid(comm: "Intracomm") -> ProcessGrid:
    return ProcessGrid.create(World.attach(comm))


@pytest.mark.parametrize("round_bytes", [columns.ROUND_BYTES, 1, 3000], ids="rounds of {}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_are_those_of_the_whole_weight(
    grid: ProcessGrid, fresh_seed: int, dtype: torch.dtype, round_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "ROUND_BYTES", round_bytes)
    draw, own = np.random.default_rng(fresh_seed), torch.Generator().manual_seed(fresh_seed + grid.world.rank)
    shared = SharedColumns(grid.node)
    for number in range(12):
        inputs, outputs = (int(n) for n in draw.integers(1, 200, 2))
        counts = draw.integers(0, 9, grid.world.size) * draw.integers(0, 2, grid.world.size)
        shape = (outputs, inputs)
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(number)).to(dtype)
        part = columns_of(outputs, grid.node)
        x = torch.randn(int(counts[grid.world.rank]), inputs, generator=own).to(dtype)

        def compute(rows: torch.Tensor, weight: torch.Tensor = weight, part: slice = part) -> torch.Tensor:
            assert rows.shape[0] and part.start < part.stop
            return rows @ weight[part].T

        found = shared.product(x, outputs, part, compute, Tag(f"dense product {number}"))
        assert found.shape == (len(x), outputs) and found.dtype == dtype
        torch.testing.assert_close(found, x @ weight.T, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("outputs", [1, 63, 64, 65, 640, 1000])
def test_columns_cover_everything_once(grid: ProcessGrid, outputs: int) -> None:
    parts = grid.node.all_gather_object(columns_of(outputs, grid.node))
    covered = [column for part in parts for column in range(part.start, part.stop)]
    assert covered == list(range(outputs))
    assert all(part.start % 64 == 0 for part in parts if part.start < part.stop)


def test_ranks_in_different_products_are_told_apart(grid: ProcessGrid) -> None:
    if grid.node.size == 1:
        return
    shared, x = SharedColumns(grid.node), torch.ones(1, 4 + grid.node.rank % 2)
    with pytest.raises(DesyncError, match="dense product 3"):
        shared.product(
            x, 8, columns_of(8, grid.node), lambda rows: rows @ torch.ones(8, 4).T, Tag("dense product 3")
        )

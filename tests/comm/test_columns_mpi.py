"""Column-parallel products on 1 to 4 ranks, some without rows, some without columns."""

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from xpar.comm import column_parallel
from xpar.comm.column_parallel import ColumnParallel, ColumnSlice, split_columns
from xpar.comm.communicator import Tag
from xpar.comm.grid import ProcessGrid
from xpar.comm.handshake import DesyncError
from xpar.comm.world import World

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def grid(comm: "Intracomm") -> ProcessGrid:
    return ProcessGrid.create(World.attach(comm))


@pytest.mark.parametrize("round_bytes", [column_parallel.ROUND_BYTES, 1, 3000], ids="rounds of {}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_are_those_of_the_whole_weight(
    grid: ProcessGrid, fresh_seed: int, dtype: torch.dtype, round_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(column_parallel, "ROUND_BYTES", round_bytes)
    draw, own = np.random.default_rng(fresh_seed), torch.Generator().manual_seed(fresh_seed + grid.world.rank)
    shared = ColumnParallel(grid.node)
    for number in range(12):
        inputs = int(draw.integers(1, 200))
        widths = [int(n) for n in draw.integers(1, 200, draw.integers(1, 4))]
        counts = draw.integers(0, 9, grid.world.size) * draw.integers(0, 2, grid.world.size)
        common = torch.Generator().manual_seed(number)
        weights = [torch.randn(width, inputs, generator=common).to(dtype) for width in widths]
        x = torch.randn(int(counts[grid.world.rank]), inputs, generator=own).to(dtype)
        shares = [share_of(weight, grid) for weight in weights]
        found = shared.products(x, shares, Tag(f"dense product {number}"))
        for y, weight in zip(found, weights, strict=True):
            assert y.shape == (len(x), len(weight)) and y.dtype == dtype
            torch.testing.assert_close(y, x @ weight.T, rtol=2e-2, atol=1e-3)


def share_of(weight: torch.Tensor, grid: ProcessGrid) -> ColumnSlice:
    part = split_columns(len(weight), grid.node)

    def compute(rows: torch.Tensor) -> torch.Tensor:
        assert rows.shape[0] and part.start < part.stop
        return rows @ weight[part].T

    return ColumnSlice(len(weight), part, compute)


def slowly(share: ColumnSlice, dawdles: tuple[bool, bool]) -> ColumnSlice:
    """Which sleeps before it computes, and after."""

    def compute(rows: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01 * dawdles[0])
        made = share.compute(rows)
        time.sleep(0.01 * dawdles[1])
        return made

    return replace(share, compute=compute)


def test_nobody_reads_what_a_faster_rank_writes_next(grid: ProcessGrid) -> None:
    """Each rank in turn is slow before its product and before it takes its results."""
    shared, size, rank = ColumnParallel(grid.node), grid.node.size, grid.node.rank
    weight = torch.eye(64 * size)
    for number in range(4 * size):
        rows = torch.full((1 + (number + rank) % 3, 64 * size), float(number * size + rank))
        share = slowly(share_of(weight, grid), (number % size == rank, (number + 1) % size == rank))
        (found,) = shared.products(rows, [share], Tag(f"dense product {number}"))
        assert torch.equal(found, rows)


@pytest.mark.parametrize("outputs", [1, 63, 64, 65, 640, 1000])
def test_columns_cover_everything_once(grid: ProcessGrid, outputs: int) -> None:
    parts = grid.node.all_gather_object(split_columns(outputs, grid.node))
    covered = [column for part in parts for column in range(part.start, part.stop)]
    assert covered == list(range(outputs))
    assert all(part.start % 64 == 0 for part in parts if part.start < part.stop)


def test_ranks_in_different_products_are_told_apart(grid: ProcessGrid) -> None:
    if grid.node.size == 1:
        return
    shared, x = ColumnParallel(grid.node), torch.ones(1, 4 + grid.node.rank % 2)
    with pytest.raises(DesyncError, match="dense product 3"):
        shared.products(x, [share_of(torch.ones(8, 4), grid)], Tag("dense product 3"))

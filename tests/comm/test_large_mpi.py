"""More than 2**31 bytes from one rank to another: counts are rows, so they stay small."""

from typing import TYPE_CHECKING

import pytest
import torch

from xpar.comm import World

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

ROW = 1 << 20
ROWS = (1 << 11) + 3


@pytest.mark.mpi(min_size=2, max_size=2, deadline=120)
def test_more_bytes_than_an_int_counts(comm: "Intracomm") -> None:
    group = World.attach(comm).comm
    assert ROWS * ROW > 2**31
    send, recv = ([0, ROWS], [0, 0]) if group.rank == 0 else ([0, 0], [ROWS, 0])
    x = torch.empty(sum(send), ROW, dtype=torch.uint8)
    for r in range(sum(send)):
        x[r] = r % 251
    got = group.all_to_all_v(x, send, recv).wait()
    if group.rank == 1:
        expected = torch.arange(ROWS) % 251
        assert torch.equal(got[:, 0].long(), expected) and torch.equal(got[:, -1].long(), expected)
        assert torch.equal(got[-1], torch.full((ROW,), (ROWS - 1) % 251, dtype=torch.uint8))

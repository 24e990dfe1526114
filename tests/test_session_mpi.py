"""What every rank of a multi-rank run may rely on."""

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi
DRAWN: list[list[int]] = []


def test_ranks_reach_each_other(comm: "Intracomm") -> None:
    assert comm.allgather(comm.rank) == list(range(comm.size))


def test_fresh_seed_is_common(comm: "Intracomm", fresh_seed: int) -> None:
    assert set(comm.allgather(fresh_seed)) == {fresh_seed}


@settings(max_examples=20)
@given(st.lists(st.integers(0, 9)))
def test_hypothesis_examples(example: list[int]) -> None:
    DRAWN.append(example)


def test_hypothesis_examples_were_common(comm: "Intracomm") -> None:
    assert DRAWN
    assert all(drawn == DRAWN for drawn in comm.allgather(DRAWN))

"""The agreement before each step: every rank knows the facts of all ranks.

Idle ranks take part, and a failure of one rank is one error of all.
"""

import random
from typing import TYPE_CHECKING

import pytest

from xpar.comm import DesyncError, RemoteRankError, World
from xpar.comm.communicator import Communicator
from xpar.comm.step_agreement import StepFacts, agree_step

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi
STOP, FLUSH = 1, 4


@pytest.fixture(scope="module")
def world(comm: "Intracomm") -> World:
    return World.attach(comm)


@pytest.fixture
def group(world: World) -> Communicator:
    return world.comm


def test_every_rank_knows_what_all_said(group: Communicator, fresh_seed: int) -> None:
    draw = random.Random(fresh_seed)
    said = [tuple(draw.randrange(2**40) for _ in range(4)) for _ in range(group.size)]
    status = [draw.choice((0, STOP, FLUSH)) for _ in range(group.size)]
    tokens, work, *notes = said[group.rank]
    got = agree_step(
        group, 3, tokens=tokens, work=work, status=status[group.rank], notes=(notes[0], notes[1])
    )
    expected = STOP * (STOP in status) | FLUSH * (FLUSH in status)
    columns = list(zip(*said, strict=True))
    assert got == StepFacts(columns[0], columns[1], expected, tuple((s[2], s[3]) for s in said))
    assert got.any_work == any(columns[1])


def test_a_failure_between_steps_is_one_error_of_all(group: Communicator) -> None:
    failure = ValueError("prompt 7 is empty") if group.rank == group.size - 1 else None
    with pytest.raises(RemoteRankError, match=f"step 5: .*\n.*rank {group.size - 1}: ValueError: prompt 7"):
        agree_step(group, 5, tokens=3, failure=failure)


@pytest.mark.mpi(min_size=2)
def test_ranks_in_different_steps_do_not_go_on(group: Communicator) -> None:
    with pytest.raises(DesyncError, match="met in different collectives"):
        agree_step(group, 4 + (group.rank == 1))


@pytest.mark.mpi(min_size=2)
def test_notes_of_different_lengths_do_not_go_on(group: Communicator) -> None:
    with pytest.raises(DesyncError, match="met in different collectives"):
        agree_step(group, 0, notes=(1,) if group.rank else ())

"""A watched job of several ranks: its survey, debug mode, and lateness."""

import re
from typing import TYPE_CHECKING

import pytest
import torch

from xpar.comm import DesyncError, World
from xpar.comm.communicator import Tag
from xpar.comm.handshake import handshake
from xpar.comm.stragglers import gather_lateness
from xpar.comm.watchdog.deadlines import Deadlines
from xpar.comm.watchdog.watchdog import WatchdogOptions

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi(min_size=2)


@pytest.fixture(scope="module")
def world(comm: "Intracomm") -> World:
    return World.attach(
        comm, deadlines=Deadlines(), watchdog=WatchdogOptions(check_collectives=True, record_waits=True)
    )


def wait_for_the_last(comm: "Intracomm", world: World) -> None:
    world.comm.barrier(patient=True)


def test_survey_finds_every_rank_where_it_waits(comm: "Intracomm", world: World) -> None:
    """Asked by each rank in turn, so that every node asks every other."""
    for asking in range(world.size):
        text = ""
        if world.rank == asking:
            assert world.watchdog is not None
            text = world.watchdog.survey()
            while len(re.findall(r"in patient barrier #\d+ of group world, for", text)) < world.size - 1:
                text = world.watchdog.survey()  # the others may be on their way
            assert all(f"rank {r} on {world.hosts[r]}" in text for r in range(world.size))
            assert "in wait_for_the_last" in text and "does not answer" not in text
        wait_for_the_last(comm, world)


def test_debug_mode_lets_pass_what_fits(world: World) -> None:
    group, size = world.comm, world.size
    rows = torch.ones(world.rank + 1, 3)
    counts = [r + 1 for r in range(size)]
    assert group.all_gather_v(rows, counts).shape == (sum(counts), 3)
    assert group.all_gather_v(rows).shape == (sum(counts), 3)
    assert torch.equal(group.all_reduce(torch.ones(4)), torch.full((4,), float(size)))
    assert group.all_to_all_v(torch.ones(size, 2), [1] * size, [1] * size).wait().shape == (size, 2)
    assert group.reduce_scatter_v(torch.ones(size, 2), [1] * size).tolist() == [[size, size]]
    group.broadcast(torch.zeros(2))
    assert handshake(group, Tag("plan", 1, 2), values=(world.rank,))[:, 0].tolist() == list(range(size))
    assert group.split(world.rank % 2, 0, "parity").size in (size // 2, size - size // 2)


def test_debug_mode_names_the_rank_that_differs(world: World) -> None:
    group, last = world.comm, world.size - 1
    odd = world.rank == last
    cases = [
        (lambda: group.all_reduce(torch.ones(4 if odd else 3)), "all_reduce of float32 [4]"),
        (
            lambda: group.all_gather_v(torch.ones(1, 3, dtype=torch.int32 if odd else torch.float32)),
            "int32 [3]",
        ),
        (lambda: group.all_gather_object(1) if odd else group.barrier(), "all_gather_object, where"),
        (lambda: handshake(group, Tag("plan", 3 if odd else 4)), "handshake plan layer 3"),
        (lambda: group.split(0, 0, "b" if odd else "a"), "split into b"),
    ]
    for call, text in cases:
        with pytest.raises(DesyncError, match=re.escape(f"rank {last} differs: ")) as caught:
            call()
        assert text in str(caught.value)
        assert len(set(group.all_gather_object(str(caught.value)))) == 1


def test_lateness_of_every_rank(world: World) -> None:
    assert world.watchdog is not None
    gather_lateness(world.comm, world.watchdog)  # empties the journals
    for step in range(5):
        handshake(world.comm, Tag("plan", 1, step))
        world.comm.all_gather_object(step)  # not counted, and nothing of the first two steps
    rows = gather_lateness(world.comm, world.watchdog)
    assert [(r.rank, r.collectives) for r in rows] == [(r, 3) for r in range(world.size)]
    assert all(0 <= r.p50 <= r.p99 and 0 <= r.last <= 1 for r in rows)
    assert sum(r.last for r in rows) >= 1

"""What ``xpar bench comm`` measures on GPUs, on host memory by a wall clock."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from xpar.comm import ProcessGrid, World
from xpar.comm.communicator import Communicator
from xpar.comm.device.peer_memory import PeerMemory
from xpar.comm.device.peer_window import PeerWindow
from xpar.comm.dispatch.allgather import AllGatherDispatcher
from xpar.comm.dispatch.one_sided import OneSidedDispatcher
from xpar.comm.placement import Placement
from xpar.engine.bench.graph_exchange import Sizes, link_gbs, measure

pytestmark = pytest.mark.mpi(deadline=60)
HOST = torch.device("cpu")


def wall_us(group: Communicator, grid: ProcessGrid, call: Callable[[], None]) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e6


def test_both_ways_are_measured_and_compared(world: World, window: PeerWindow, fresh_seed: int) -> None:
    grid = ProcessGrid.create(world)
    placement = Placement.blocks(6, grid.shape.ep)
    movers: list[Any] = [
        OneSidedDispatcher(grid.moe, placement, window),
        AllGatherDispatcher(grid.moe, placement, whole=True),
    ]
    found = measure(grid, Sizes(5, 16, 6, 2, fresh_seed), movers, wall_us)
    assert {key for key in found if key.endswith(" us")} == {
        f"{name} {what} us"
        for name in ("one-sided", "allgather")
        for what in ("dispatch", "combine", "round trip")
    }
    assert all(found[key] > 0 for key in found if key.endswith(" us"))
    # The interpreter cuts bits of bfloat16 where torch rounds, so bits are compared on one rank alone.
    assert found["remote_rows"] <= 5 * (grid.moe.size - 1) and isinstance(found["same_bits"], bool)
    movers[0].name = "other"
    twice = measure(grid, Sizes(5, 16, 6, 2, fresh_seed), movers[1:] * 2, wall_us)
    assert twice["same_bits"]


def test_a_copy_reaches_the_next_rank(group: Communicator) -> None:
    memory = PeerMemory.open(group, 4096, HOST)
    memory.bytes[:100] = group.rank + 1
    memory.bytes[100:] = 0
    group.barrier()
    mine = memory.bytes.clone()
    target = (group.rank + 1) % group.size
    if group.rank == 0:
        memory.copy_to(target, 60)
    group.barrier()
    expected = mine.clone()
    if group.rank == 1 or (group.size == 1):
        expected[:60] = 1
    assert torch.equal(memory.bytes, expected)
    group.barrier()
    memory.close()
    assert link_gbs(group, HOST, 1 << 20) > 0

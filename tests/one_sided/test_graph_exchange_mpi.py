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
from xpar.engine.bench.comm import CODES_TOLERANCE
from xpar.engine.bench.graph_exchange import Sizes, link_gbs, measure
from xpar.kernels.quantised_weight import ActivationScheme
from xpar.kernels.row_format import RowFormat

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
    assert twice["same_bits"] and twice["rel_error"] == 0


def test_rows_in_codes_are_measured_beside_numbers(world: World, window: PeerWindow, fresh_seed: int) -> None:
    grid, form = ProcessGrid.create(world), RowFormat(256, ActivationScheme())
    placement = Placement.blocks(6, grid.shape.ep)
    movers: list[Any] = [
        OneSidedDispatcher(grid.moe, placement, window),
        AllGatherDispatcher(grid.moe, placement, whole=True),
    ]
    found = measure(grid, Sizes(5, 256, 6, 2, fresh_seed), movers, wall_us, form)
    assert found["row_bytes"] == 256 + 2 * 4 + 8 and found["row_format"] == str(form)
    steps = ("encode", "dispatch", "combine", "round trip")
    assert all(found[f"{name} {what} us"] > 0 for name in ("one-sided", "allgather") for what in steps)
    assert 1e-3 < found["rel_error"] <= CODES_TOLERANCE
    # The same movers take numbers again.
    plain = measure(grid, Sizes(5, 256, 6, 2, fresh_seed), movers, wall_us)
    assert plain["rel_error"] == 0 and plain["row_bytes"] == 512


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

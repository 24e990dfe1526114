"""The measurements of ``check_comm.py``: medians of single calls, all ranks starting together."""

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from exact_experts import routing_of
from torch import Tensor

from xpar.comm import ProcessGrid, World
from xpar.comm.communicator import Tag
from xpar.comm.device.backend import synchronize
from xpar.comm.device.nccl_library import open_library
from xpar.comm.device.transport import nccl_transport
from xpar.comm.dispatch.allgather import AllGatherDispatcher
from xpar.comm.dispatch.alltoall_early import EarlyAllToAllDispatcher
from xpar.comm.dispatch.base import Dispatcher
from xpar.comm.placement import Placement
from xpar.comm.watchdog.deadlines import Deadlines
from xpar.kernels.contracts import Routing

HIDDEN = 4096
EXPERTS, TOP_K = 64, 8
TOKENS = (16, 128, 1024, 4096, 16384)


def figures(world: World, grid: ProcessGrid, link_gbs: float) -> Iterator[dict[str, Any]]:
    """One record a measurement. ``gbs``: 1e9 bytes that cross the link of a GPU, one direction, a second."""
    small = grid.device.type == "cpu"
    for tokens in TOKENS[: 2 if small else None]:
        x = torch.randn(tokens, HIDDEN, device=grid.device).to(torch.bfloat16)
        size, each = world.size, tokens // world.size
        away = (size - 1) * x.nbytes
        counts = [tokens] * size
        yield record(
            world,
            grid,
            "all_gather_v equal",
            tokens,
            away,
            link_gbs,
            lambda x=x, c=counts: grid.moe.all_gather_v(x, c),
        )
        uneven = [tokens - r for r in range(size)]
        part = x[: uneven[grid.moe.rank]]
        yield record(
            world,
            grid,
            "all_gather_v uneven",
            tokens,
            away,
            link_gbs,
            lambda x=part, c=uneven: grid.moe.all_gather_v(x, c),
        )
        pairs = [each] * size
        rows = x[: each * size]
        yield record(
            world, grid, "all_to_all_v", tokens, rows.nbytes // size * (size - 1), link_gbs,
            lambda x=rows, c=pairs: grid.moe.all_to_all_v(x, c, c).wait(),
        )  # fmt: skip
        yield record(
            world,
            grid,
            "all_reduce",
            tokens,
            2 * (size - 1) * x.nbytes // size,
            link_gbs,
            lambda x=x: grid.moe.all_reduce(x),
        )
        for cls in (AllGatherDispatcher, EarlyAllToAllDispatcher):
            yield from steps(world, grid, cls, x, link_gbs)
    if grid.device.type == "cuda" and grid.transport is not None and grid.transport.choice.name == "nccl":
        yield from launch_modes(world, grid, link_gbs)


def steps(world: World, grid: ProcessGrid, cls: type, x: Tensor, link_gbs: float) -> Iterator[dict[str, Any]]:
    """Plan, dispatch and combine without experts between: the outputs are the rows that came."""
    placement = Placement.blocks(EXPERTS, world.size).to(grid.device)
    mover: Dispatcher = cls(grid.moe, placement)
    generator = torch.Generator().manual_seed(world.rank)
    r = routing_of(x.shape[0], TOP_K, EXPERTS, generator, drop=0.0)
    routing = Routing(r.topk_ids.to(grid.device), r.topk_weights.to(grid.device))
    tag = Tag("bench", 0, 0)

    def step() -> Any:
        plan = mover.plan(routing, tag=tag, hidden_size=x.shape[1], dtype=x.dtype)
        arrived = mover.dispatch(x, plan).wait()
        rows = arrived.hidden_states if arrived.rows is None else arrived.hidden_states[arrived.rows]
        return mover.combine(rows, plan).wait(), plan

    traffic = step()[1].traffic
    remote = traffic.remote_rows * x.shape[1] * x.element_size()
    yield record(world, grid, f"{cls.name} step", x.shape[0], 2 * remote, link_gbs, step)


def launch_modes(world: World, grid: ProcessGrid, link_gbs: float) -> Iterator[dict[str, Any]]:
    """What launches cost the host, by calls of NCCL that block and by polled ones: ``us_host`` of each."""
    assert grid.transport is not None
    ones = [1] * world.size
    x = torch.ones(world.size, 64, device=grid.device)
    polled = nccl_transport(
        world.comm, grid.device, grid.transport.choice, Deadlines(), open_library(), blocking=False
    )
    for name, group in (("", grid.moe), (", polled", polled.wrap(world.comm))):
        calls = {
            "tiny all_gather": lambda g=group: g.all_gather_v(x[:1], ones),
            "tiny all_to_all": lambda g=group: g.all_to_all_v(x, ones, ones).wait(),
        }
        for what, call in calls.items():
            yield record(world, grid, what + name, world.size, 0, link_gbs, call)
    polled.close()


def record(
    world: World,
    grid: ProcessGrid,
    what: str,
    tokens: int,
    nbytes: int,
    link_gbs: float,
    call: Callable[[], Any],
) -> dict[str, Any]:
    """Seconds from the common start until the GPU is done, host work included; the slowest rank counts."""
    for _ in range(3):
        call()
    seconds = []
    for _ in range(15):
        synchronize(grid.device)
        world.comm.barrier()
        begin = time.perf_counter()
        call()
        synchronize(grid.device)
        seconds.append(time.perf_counter() - begin)
    slowest = max(world.comm.all_gather_object(median(seconds)))
    launched = max(world.comm.all_gather_object(host_seconds(world, grid, call)))
    issued = []
    for _ in range(5):
        world.comm.barrier()
        begin = time.perf_counter()
        for _ in range(10):
            call()
        synchronize(grid.device)
        issued.append((time.perf_counter() - begin) / 10)
    queued = max(world.comm.all_gather_object(median(issued)))
    return {
        "what": what,
        "size": f"{tokens} x {HIDDEN} bf16" if nbytes else "256 B",
        "us": slowest * 1e6,
        "us_queued": queued * 1e6,
        "us_host": launched * 1e6,
        "bytes": nbytes,
        "gbs": nbytes / slowest / 1e9,
        "gbs_queued": nbytes / queued / 1e9,
        "bound_gbs": link_gbs,
        "us_bound": nbytes / link_gbs / 1e3,
    }


def host_seconds(world: World, grid: ProcessGrid, call: Callable[[], Any]) -> float:
    """Seconds of the calling thread for one call, while the GPU has enough to do not to be waited for."""
    spent = []
    for _ in range(10):
        synchronize(grid.device)
        world.comm.barrier()
        begin = time.perf_counter()
        for _ in range(5):
            call()
        spent.append((time.perf_counter() - begin) / 5)
    return median(spent)

"""The checks of ``check_comm.py``: collectives and dispatchers on a device against the same on the host over
MPI."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import nccl_ep_checks
import torch
from exact_experts import experts_of, routing_of
from torch import Tensor

from xpar.comm import ProcessGrid, World
from xpar.comm.communicator import Communicator, Tag
from xpar.comm.device.nccl_backend import NcclBackend
from xpar.comm.device.nccl_communicator import NcclCommunicator, give_up, poll_until_done
from xpar.comm.device.nccl_library import NcclError, open_library
from xpar.comm.device.transport import open_transport
from xpar.comm.device.transport_choice import TRANSPORTS
from xpar.comm.device.watch import Watch
from xpar.comm.dispatch.allgather import AllGatherDispatcher
from xpar.comm.dispatch.alltoall_early import EarlyAllToAllDispatcher
from xpar.comm.dispatch.replicated import ReplicatedDispatcher
from xpar.comm.placement import Placement
from xpar.comm.reduction import sum_outputs
from xpar.comm.watchdog.deadlines import Deadlines
from xpar.kernels.choice import Choice
from xpar.kernels.contracts import Routing

Check = Callable[[], str | None]
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.uint8)
DISPATCHERS = (ReplicatedDispatcher, AllGatherDispatcher, EarlyAllToAllDispatcher)
HIDDEN = 96


def checks(world: World, grid: ProcessGrid, transport: str, seed: int) -> Iterator[tuple[str, Check]]:
    """(title, check) of everything that applies to ``transport``."""
    host, group = world.comm, grid.moe
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        yield f"all_gather_v {name}", lambda d=dtype: gather(host, group, grid.device, d, seed)
        yield f"all_to_all_v {name}", lambda d=dtype: exchange(host, group, grid.device, d, seed)
        if dtype != torch.uint8:
            yield f"sums {name}", lambda d=dtype: sums(host, group, grid.device, d, seed)
    yield "broadcast, split", lambda: broadcast_and_split(group, grid.device)
    yield "host tensors", lambda: host_tensors(host, grid.world.comm)
    for cls in DISPATCHERS:
        for exact in (False, True):
            for dtype in (torch.float32, torch.bfloat16):
                title = f"dispatch {cls.name}{' exact' if exact else ''} {str(dtype)[6:]}"
                yield title, lambda c=cls, e=exact, d=dtype: dispatched(world, grid, c, e, d, seed)
    if grid.device.type == "cuda" and transport == "nccl":
        yield "allgather without host sync", lambda: no_sync(grid, seed)
        yield from one_sided(grid, seed)
        for title, check in nccl_ep_checks.checks(grid, seed):
            yield title, partial(require, check)


def one_sided(grid: ProcessGrid, seed: int) -> Iterator[tuple[str, Check]]:
    """The dispatcher without NCCL, where the ranks map each other's memory.

    ``check_one_sided.py`` has more of it.
    """
    if grid.peer_window is None or grid.peer_window.access.way is None:
        return
    import one_sided_checks

    for title, check in one_sided_checks.checks(grid, {"2048 wide, top 8 of 64": (2048, 64, 8)}, seed):
        yield f"one-sided, {title}", partial(require, check)


def require(check: Check) -> None:
    """Raise what ``check`` returns."""
    problem = check()
    assert problem is None, problem


def last_checks(world: World, grid: ProcessGrid, transport: str, seed: int) -> Iterator[tuple[str, Check]]:
    """Those that could leave a GPU unusable for what comes after them."""
    if grid.device.type == "cuda" and transport == "nccl" and world.size > 1:
        yield "joining alone ends at the deadline", lambda: joins_alone(world)
        yield "an exchange that nobody joins is given up", lambda: given_up(world, grid)
        yield "allgather in a CUDA graph", lambda: captured(grid, seed)


def host_grid(world: World, transport: str) -> ProcessGrid:
    """A grid whose groups move host tensors through ``transport``, as if they lay on a device."""
    choice = Choice(next(t for t in TRANSPORTS if t.name == transport), ())
    opened = open_transport(world.comm, torch.device("cpu"), choice, Deadlines(), required=True)
    grid = ProcessGrid.create(world)
    comm = opened.wrap(world.comm)
    return replace(grid, moe=opened.wrap(grid.moe), world=replace(world, comm=comm), transport=opened)


ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
"""Relative error between two orders of rounding the same fp32 sums."""


def rows_of(rank: int, seed: int, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1000 + rank)
    return (torch.randn(rows, width, generator=generator) * 20).to(dtype)


def expect(got: Tensor, want: Tensor, what: str) -> None:
    got = got.cpu()
    same = got.dtype == want.dtype and got.shape == want.shape and torch.equal(got, want)
    assert same, f"{what}: {tuple(got.shape)} {got.dtype} differs from {tuple(want.shape)} {want.dtype}"


def gather(
    host: Communicator, group: Communicator, device: torch.device, dtype: torch.dtype, seed: int
) -> None:
    for counts in ([5] * group.size, [7 * r for r in range(group.size)], [0] * group.size, [0, 1000]):
        counts = (counts * group.size)[: group.size]
        x = rows_of(group.rank, seed, counts[group.rank], 33, dtype)
        want = host.all_gather_v(x, counts)
        expect(group.all_gather_v(x.to(device), counts), want, f"counts {counts}")
        strided = torch.cat([x, x], dim=1).to(device)[:, :33]
        expect(group.all_gather_v(strided), want, f"strided, counts {counts}")


def exchange(
    host: Communicator, group: Communicator, device: torch.device, dtype: torch.dtype, seed: int
) -> None:
    for scale in (0, 1, 311):
        for skip in (None, group.rank):
            table = [[scale * ((s * 3 + t * 2) % 4) for t in range(group.size)] for s in range(group.size)]
            send = [0 if skip == t else table[group.rank][t] for t in range(group.size)]
            recv = [table[s][group.rank] for s in range(group.size)]
            x, out = rows_of(group.rank, seed, sum(send), 33, dtype), rows_of(9, seed, sum(recv), 33, dtype)
            got = group.all_to_all_v(x.to(device), send, recv, out.to(device), skip).wait()
            want = host.all_to_all_v(x, send, recv, out.clone(), skip).wait()
            expect(got, want, f"send {send} recv {recv} skip {skip}")


def sums(
    host: Communicator, group: Communicator, device: torch.device, dtype: torch.dtype, seed: int
) -> None:
    for rows in (0, 1, 64, 5001):
        x = rows_of(group.rank, seed, rows, 33, dtype)
        expect(group.all_reduce(x.to(device)), host.all_reduce(x), f"all_reduce of {rows} rows")
        even, rest = divmod(rows, group.size)
        for counts in ([even + (r < rest) for r in range(group.size)], [rows, *[0] * (group.size - 1)]):
            got = group.reduce_scatter_v(x.to(device), counts)
            expect(got, host.reduce_scatter_v(x, counts), f"reduce_scatter_v {counts}")


def broadcast_and_split(group: Communicator, device: torch.device) -> None:
    root = group.size - 1
    x = torch.full((3, 2), float(group.rank), device=device)
    expect(group.broadcast(x, root), torch.full((3, 2), float(root)), "broadcast")
    part = group.split(0, -group.rank, "reversed")
    got = part.all_gather_v(torch.tensor([group.rank], device=device))
    expect(got, torch.arange(group.size).flip(0), "gather in the split group")


def host_tensors(host: Communicator, comm: Communicator) -> None:
    x = torch.tensor([comm.rank])
    expect(comm.all_gather_v(x), torch.arange(comm.size), "host tensor in a device group")
    expect(comm.all_reduce(x), host.all_reduce(x), "sum of host tensors in a device group")


def dispatched(
    world: World, grid: ProcessGrid, cls: type, exact: bool, dtype: torch.dtype, seed: int
) -> None:
    """The dispatcher on the device against the one on the host: same routing, same stand-in experts.

    Sums may round otherwise on another device. What differs is raised after the last case, so that all ranks
    come here.
    """
    size, rank = world.size, world.rank
    wrong = []
    for case, (experts, k) in enumerate([(2 * size + 1, 2), (64, 8), (max(1, size - 1), 1)]):
        tokens = 40 if cls is ReplicatedDispatcher else (rank * 57 + case * 11) % 230
        same = 0 if cls is ReplicatedDispatcher else rank
        generator = torch.Generator().manual_seed(seed + 100 * case + same)
        routing = routing_of(tokens, k, experts, generator)
        x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
        placement = Placement.blocks(experts, size)
        want = through(cls(world.comm, placement), x, routing, exact, rank)
        there = Routing(routing.topk_ids.to(grid.device), routing.topk_weights.to(grid.device))
        mover = cls(grid.moe, placement.to(grid.device))
        got = through(mover, x.to(grid.device), there, exact, rank)
        error = float((got.cpu().double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))
        if got.dtype != want.dtype or got.shape != want.shape or not error <= ROUNDING[dtype]:
            wrong.append(f"{tokens} tokens, top {k} of {experts}: relative error {error:.1e}")
    assert not wrong, "; ".join(wrong)


def through(mover, x: Tensor, routing: Routing, exact: bool, rank: int) -> Tensor:  # type: ignore[no-untyped-def]
    plan = mover.plan(routing, tag=Tag("check", 0, 0), hidden_size=x.shape[1], dtype=x.dtype, exact=exact)
    arrived = mover.dispatch(x, plan).wait()
    held = mover.placement.experts_of(rank)
    made = experts_of(arrived, held, exact) if held else x.new_empty(0, x.shape[1])
    return sum_outputs(mover.combine(made, plan).wait()).tensor


def no_sync(grid: ProcessGrid, seed: int) -> None:
    """torch itself raises where the host would wait for the GPU."""
    mover, x, routing = device_case(grid, seed)
    expect(through_whole(mover, x, routing), through_whole(mover, x, routing).cpu(), "twice")
    torch.cuda.set_sync_debug_mode("error")
    try:
        through_whole(mover, x, routing)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(grid: ProcessGrid, seed: int) -> str:
    """Plan, dispatch, experts and combine in one graph, replayed on other tokens."""
    mover, x, routing = device_case(grid, seed)
    watch = grid.transport.watch if grid.transport is not None else None
    assert watch is not None
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        through_whole(mover, x, routing)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with watch.paused(), torch.cuda.graph(graph):
        out = through_whole(mover, x, routing)
    x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.dtype))
    graph.replay()
    want = through_whole(mover, x, routing)
    expect(out, want.cpu(), "replayed graph")
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(50):
        graph.replay()
    torch.cuda.synchronize()
    return f"replay {(time.perf_counter() - begin) / 50 * 1e6:.0f} us"


def device_case(grid: ProcessGrid, seed: int) -> tuple[AllGatherDispatcher, Tensor, Routing]:
    generator = torch.Generator().manual_seed(seed + grid.world.rank)
    routing = routing_of(64 + grid.world.rank, 8, 64, generator)
    x = torch.randn(64 + grid.world.rank, 512, generator=generator).to(torch.bfloat16).to(grid.device)
    placement = Placement.blocks(64, grid.shape.ep).to(grid.device)
    there = Routing(routing.topk_ids.to(grid.device), routing.topk_weights.to(grid.device))
    return AllGatherDispatcher(grid.moe, placement), x, there


def through_whole(mover: AllGatherDispatcher, x: Tensor, routing: Routing) -> Tensor:
    """Like :func:`through`, with arithmetic that asks the GPU nothing."""
    plan = mover.plan(routing, tag=Tag("check", 0, 0), hidden_size=x.shape[1], dtype=x.dtype)
    arrived = mover.dispatch(x, plan).wait()
    weights = arrived.topk_weights * (arrived.topk_ids >= 0)
    made = (arrived.hidden_states.float() * (weights * (arrived.topk_ids + 1)).sum(1)[:, None]).to(x.dtype)
    return mover.combine(made, plan).wait().tensor


def joins_alone(world: World) -> str:
    """Only one rank of two joins; it must come back, and the job go on."""
    if world.rank:
        return ""
    library = open_library()
    begin = time.monotonic()
    comm = library.init(2, 0, library.unique_id(), False)
    try:
        poll_until_done(library, comm, 3.0, "joining alone")
    except NcclError as error:
        waited = time.monotonic() - begin
        ended = give_up(library, comm, 5.0)
        assert waited < 6, f"came back after {waited:.1f} s"
        return f"{waited:.1f} s, abort {'returned' if ended else 'did not return'}: {error}"
    raise AssertionError("NCCL says that one rank of two is complete")


def given_up(world: World, grid: ProcessGrid) -> str:
    """Rank 0 alone starts an exchange on a communicator of its own.

    Afterwards the other communicators work.
    """
    watch = Watch(lambda wrong: None)
    link = NcclCommunicator.connect(
        open_library(), world.comm, Deadlines(connect=60, launch=20, finish=1e6, abort=5), watch, grid.device
    )
    mover = NcclBackend(link, grid.device)
    mover.check(world.comm)
    remark = ""
    if world.rank == 0:
        ones = [1] * world.size
        x = torch.ones(world.size, 1 << 20, device=grid.device)
        mover.all_to_all(x, ones, ones, torch.empty_like(x))
        begin = time.monotonic()
        try:
            mover.finish("an exchange that nobody joins", 3.0)
        except NcclError:
            remark = f"after {time.monotonic() - begin:.1f} s, abort included"
        assert remark, "the GPU says that an exchange without partner is done"
    world.comm.barrier()
    if world.rank:
        link.break_off("the other rank gave up")
    torch.cuda.synchronize()
    watch.close()
    got = grid.moe.all_gather_v(torch.tensor([world.rank], device=grid.device))
    expect(got, torch.arange(world.size), "another communicator afterwards")
    return remark

"""The checks of ``check_comm.py`` for rows that NCCL's EP extension moves: the bits of the all-gather
dispatcher, launched and recorded.

Ranks of one node do, where the extension has what it needs.
"""

from collections.abc import Iterator
from functools import partial

import torch
from exact_experts import routing_of
from torch import Tensor

from xpar.comm.communicator import Communicator, Tag
from xpar.comm.device.nccl_ep_exchange import NcclEp
from xpar.comm.dispatch.allgather import AllGatherDispatcher
from xpar.comm.dispatch.base import Dispatcher
from xpar.comm.dispatch.nccl_ep import NcclEpDispatcher
from xpar.comm.grid import ProcessGrid
from xpar.comm.placement import Placement
from xpar.kernels.contracts import Routing, Slots
from xpar.kernels.rows import weighted_sum

SHAPES = {"2048 wide, top 8 of 64": (2048, 64, 8), "7168 wide, top 8 of 256": (7168, 256, 8)}
COUNTS = ((16, 16), (1, 7), (0, 3), (64, 65), (300, 2))


def checks(grid: ProcessGrid, seed: int) -> Iterator[tuple[str, partial[str | None]]]:
    """(title, check) of everything, as long as the extension is there; a check returns what is wrong."""
    if grid.nccl_ep is None or grid.nccl_ep.refusal is not None:
        return
    for name, shape in SHAPES.items():
        for exact in (False, True):
            title = f"nccl-ep, {name}{' exact' if exact else ''}: bits of allgather"
            yield title, partial(same_bits, grid.moe, grid.nccl_ep, grid.device, *shape, exact, seed)
    uneven = (512, 2 * grid.moe.size + 1, 3)
    yield (
        "nccl-ep, uneven experts",
        partial(same_bits, grid.moe, grid.nccl_ep, grid.device, *uneven, False, seed),
    )
    for exact in (False, True):
        yield f"nccl-ep, recorded{' exact' if exact else ''}", partial(recorded, grid, exact, seed)


def movers(
    group: Communicator, connections: NcclEp, device: torch.device, experts: int, exact: bool
) -> tuple[Dispatcher, Dispatcher]:
    placement = Placement.blocks(experts, group.size).to(device)
    theirs = AllGatherDispatcher(group, placement, whole=not exact)
    return NcclEpDispatcher(group, placement, connections), theirs


def tokens_of(
    rank: int, device: torch.device, tokens: int, shape: tuple[int, int, int], seed: int
) -> tuple[Tensor, Routing]:
    width, experts, k = shape
    generator = torch.Generator().manual_seed(seed * 64 + rank)
    ids = routing_of(tokens, k, experts, generator).topk_ids.to(device)
    weights = torch.rand(tokens, k, generator=generator).to(device)
    return torch.randn(tokens, width, generator=generator).to(torch.bfloat16).to(device), Routing(
        ids, weights
    )


def through(mover: Dispatcher, x: Tensor, routing: Routing, exact: bool, fused: bool = True) -> Tensor:
    """Send tokens through stand-in experts, which leave slots where they lie if ``fused``, else sum them."""
    plan = mover.plan(routing, tag=Tag("check"), hidden_size=x.shape[1], dtype=x.dtype, exact=exact)
    arrived = mover.dispatch(x, plan).wait()
    ids = arrived.topk_ids
    here, rows = (
        ids >= 0,
        arrived.hidden_states if arrived.rows is None else arrived.hidden_states[arrived.rows],
    )
    live = torch.where(here.any(1)[:, None], rows, 0).float()
    made = torch.where(here[..., None], live[:, None] * (1.0 + ids[..., None] / 8), float("nan"))
    slots = made.flatten(0, 1).to(torch.bfloat16)
    if isinstance(mover, NcclEpDispatcher) and fused:
        return mover.combine_slots(Slots(slots), plan).wait().tensor
    if exact:
        return mover.combine(slots[here.reshape(-1)], plan).wait().tensor
    places = torch.arange(ids.numel(), device=ids.device).view(ids.shape).masked_fill(~here, -1)
    return mover.combine(weighted_sum(slots, arrived.topk_weights, places), plan).wait().tensor


def same_bits(
    group: Communicator,
    connections: NcclEp,
    device: torch.device,
    width: int,
    experts: int,
    k: int,
    exact: bool,
    seed: int,
    steps: int = 20,
) -> str | None:
    ours, theirs = movers(group, connections, device, experts, exact)
    wrong = []
    for n in range(steps):
        counts = COUNTS[n % len(COUNTS)]
        x, routing = tokens_of(group.rank, device, counts[group.rank % 2], (width, experts, k), seed + n)
        want = through(theirs, x, routing, exact)
        got = through(ours, x, routing, exact, fused=n % 2 == 0)
        if not torch.equal(got, want):
            wrong.append(f"step {n} {counts}: {int((got != want).sum())} of {got.numel()} differ")
    return "; ".join(wrong[:3]) or None


def recorded(grid: ProcessGrid, exact: bool, seed: int) -> str | None:
    """Two exchanges in one graph, replayed on other inputs, between launched ones."""
    assert grid.nccl_ep is not None and grid.transport is not None and grid.transport.watch is not None
    ours, theirs = movers(grid.moe, grid.nccl_ep, grid.device, 64, exact)
    shape, rank = (2048, 64, 8), grid.moe.rank
    x, routing = tokens_of(rank, grid.device, 16, shape, seed)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        through(ours, x, routing, exact)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with grid.transport.watch.paused(), torch.cuda.graph(graph):
        first = through(ours, x, routing, exact)
        second = through(ours, first, routing, exact)
    wrong = 0
    for n in range(100):
        other, its = tokens_of(rank, grid.device, 16, shape, seed + n)
        x.copy_(other)
        routing.topk_ids.copy_(its.topk_ids)
        routing.topk_weights.copy_(its.topk_weights)
        graph.replay()
        grid.transport.follow("a recorded exchange")
        want = through(theirs, x, routing, exact)
        wrong += int(not torch.equal(first, want) or not torch.equal(through(ours, x, routing, exact), want))
        wrong += int(not torch.equal(second, through(theirs, want, routing, exact)))
    return f"{wrong} of 200 comparisons differ" if wrong else None

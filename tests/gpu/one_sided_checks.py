"""The checks of ``check_one_sided.py``: bits against the all-gather dispatcher, many steps in a row, and
ranks that stay away."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from exact_experts import routing_of
from torch import Tensor

from xpar.comm import ProcessGrid, World
from xpar.comm.communicator import Tag
from xpar.comm.device.mappings import DescriptorMapping, IpcMapping
from xpar.comm.device.peer_memory import PeerMemory
from xpar.comm.device.peer_window import PeerWindow
from xpar.comm.device.trial import try_exchange
from xpar.comm.dispatch.allgather import AllGatherDispatcher
from xpar.comm.dispatch.base import Dispatcher
from xpar.comm.dispatch.one_sided import OneSidedDispatcher
from xpar.comm.placement import Placement
from xpar.comm.watchdog.deadlines import Deadlines
from xpar.kernels.contracts import ExpertInput, Routing, Slots
from xpar.kernels.gpu.one_sided import Exchange, Step
from xpar.kernels.gpu.rows import weighted_sum

VARIANTS = 5
COUNTS = ((3, 5), (0, 4), (2, 0), (40, 1), (1, 1), (0, 0), (300, 257))


def access(world: World, grid: ProcessGrid, steps: int, seed: int) -> dict[str, Any]:
    """Open 64 MB in each way, with a trial, and see that the GPU's memory is given back."""
    found: dict[str, Any] = {"visible": torch.cuda.device_count(), "wrong": []}
    for way in (IpcMapping, DescriptorMapping):
        torch.cuda.synchronize()
        world.comm.barrier()
        before = torch.cuda.mem_get_info()[0]
        begin = time.perf_counter()
        memory = PeerMemory.open(
            grid.moe, 64 << 20, grid.device, ways=(way,), trial=lambda m: try_exchange(m, Deadlines())
        )
        opened, during = time.perf_counter() - begin, torch.cuda.mem_get_info()[0]
        memory.close()
        left = before - torch.cuda.mem_get_info()[0]
        found[way.way] = {"seconds": round(opened, 4), "MB": (before - during) >> 20, "MB_left": left >> 20}
        if left > 4 << 20:
            found["wrong"].append(f"{way.way}: {left} bytes are not given back")
    return found


def checks(
    grid: ProcessGrid, shapes: Mapping[str, tuple[int, int, int]], seed: int
) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """(title, check): both dispatchers on the same tokens give the same bits, in 60 steps of changing sizes
    and inputs."""
    for name, (h, experts, k) in shapes.items():
        for exact in (False, True):
            title = f"{name}{' exact' if exact else ''}: bits of allgather"
            yield title, lambda h=h, e=experts, k=k, x=exact: same_bits(grid, h, e, k, x, seed)
    yield "fewer experts than ranks", lambda: same_bits(grid, 512, max(1, grid.moe.size - 1), 1, False, seed)
    yield "uneven experts, odd width", lambda: same_bits(grid, 333, 2 * grid.moe.size + 1, 3, False, seed)
    yield "recorded", lambda: recorded(grid, seed)
    yield "no hidden wait", lambda: no_sync(grid, seed)


def tokens_of(
    grid: ProcessGrid, tokens: int, h: int, experts: int, k: int, seed: int
) -> tuple[Tensor, Routing]:
    generator = torch.Generator().manual_seed(seed * 64 + grid.moe.rank)
    routing = routing_of(tokens, k, experts, generator)
    weights = torch.rand(tokens, k, generator=generator)
    x = torch.randn(tokens, h, generator=generator).to(torch.bfloat16)
    return x.to(grid.device), Routing(routing.topk_ids.to(grid.device), weights.to(grid.device))


def slots_of(arrived: ExpertInput) -> Tensor:
    """[M k, H]: what stand-in experts make of every slot; NaN where none is here. Asks the GPU nothing."""
    here = arrived.topk_ids >= 0
    rows = torch.where(here.any(1)[:, None], arrived.hidden_states, 0).float()
    made = rows[:, None] * (1.0 + arrived.topk_ids[..., None] / 8)
    return torch.where(here[..., None], made, float("nan")).flatten(0, 1).to(torch.bfloat16)


def through(mover: Dispatcher, x: Tensor, routing: Routing, exact: bool, fused: bool = True) -> Tensor:
    plan = mover.plan(routing, tag=Tag("check"), hidden_size=x.shape[1], dtype=x.dtype, exact=exact)
    arrived = mover.dispatch(x, plan).wait()
    if arrived.rows is not None:
        arrived = ExpertInput(arrived.hidden_states[arrived.rows], arrived.topk_ids, arrived.topk_weights)
    slots = slots_of(arrived)
    if isinstance(mover, OneSidedDispatcher) and fused:
        return mover.combine_slots(Slots(slots), plan).wait().tensor
    if exact:
        return mover.combine(slots[arrived.topk_ids.reshape(-1) >= 0], plan).wait().tensor
    made = weighted_sum(slots, arrived.topk_weights, arrived.topk_ids, in_place=True)
    return mover.combine(made, plan).wait().tensor


def movers(grid: ProcessGrid, experts: int) -> tuple[OneSidedDispatcher, AllGatherDispatcher]:
    assert grid.peer_window is not None
    placement = Placement.blocks(experts, grid.shape.ep, grid.shape.etp).to(grid.device)
    return OneSidedDispatcher(grid.moe, placement, grid.peer_window), AllGatherDispatcher(grid.moe, placement)


def same_bits(grid: ProcessGrid, h: int, experts: int, k: int, exact: bool, seed: int) -> str | None:
    ours, theirs = movers(grid, experts)
    wrong = []
    for n in range(60):
        counts = COUNTS[n % len(COUNTS)]
        x, routing = tokens_of(grid, counts[grid.moe.rank % 2], h, experts, k, seed + n)
        want = through(theirs, x, routing, exact)
        got = through(ours, x, routing, exact, fused=n % 2 == 0)
        if not torch.equal(got, want):
            wrong.append(f"step {n} {counts}: {int((got != want).sum())} of {got.numel()} differ")
    return "; ".join(wrong[:3]) or None


def recorded(grid: ProcessGrid, seed: int) -> str | None:
    """A layer's exchange in one graph, replayed on 200 other inputs, beside the same launched through the
    all-gather."""
    ours, theirs = movers(grid, 64)
    x, routing = tokens_of(grid, 16, 2048, 64, 8, seed)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        through(ours, x, routing, False)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    assert grid.transport is not None and grid.transport.watch is not None
    with grid.transport.watch.paused(), torch.cuda.graph(graph):
        out = through(ours, x, routing, False)
    wrong = 0
    for n in range(200):
        other, its = tokens_of(grid, 16, 2048, 64, 8, seed + n)
        x.copy_(other)
        routing.topk_ids.copy_(its.topk_ids)
        routing.topk_weights.copy_(its.topk_weights)
        graph.replay()
        got = out.clone()
        wrong += int(not torch.equal(got, through(theirs, x, routing, False)))
        wrong += int(not torch.equal(got, through(ours, x, routing, False)))
    return f"{wrong} of 200 replays differ" if wrong else None


def no_sync(grid: ProcessGrid, seed: int) -> str | None:
    """torch itself raises where the host would wait for the GPU."""
    ours, _ = movers(grid, 64)
    x, routing = tokens_of(grid, 16, 2048, 64, 8, seed)
    for exact in (False, True):
        through(ours, x, routing, exact)
        torch.cuda.set_sync_debug_mode("error")
        try:
            through(ours, x, routing, exact)
        except RuntimeError as found:
            return str(found).splitlines()[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return None


def stress(world: World, grid: ProcessGrid, steps: int, seed: int) -> dict[str, Any]:
    """Steps with inputs that change every time, ranks tied by flags alone.

    Everything that arrives is compared.
    """
    window, size, rank = grid.peer_window, grid.moe.size, grid.moe.rank
    assert window is not None
    h, experts, k = 2048, 64, 8
    placement = Placement.blocks(experts, size).to(grid.device)
    owner, local = placement.owner.to(torch.int32), placement.local.to(torch.int32)
    cases = []
    for n in range(VARIANTS):
        counts = tuple((16, 7, 0, 33)[(r + n) % 4] for r in range(size))
        generators = [torch.Generator().manual_seed(seed + 100 * n + r) for r in range(size)]
        routings = [routing_of(t, k, experts, g) for t, g in zip(counts, generators, strict=True)]
        rows = [
            torch.randn(t, h, generator=g).to(torch.bfloat16) for t, g in zip(counts, generators, strict=True)
        ]
        ids = torch.cat([r.topk_ids for r in routings]).to(grid.device)
        weights = torch.cat([r.topk_weights for r in routings]).to(grid.device)
        here = placement.local_ids(ids, rank)
        cases.append(
            (Step(counts, k, 2 * h, h, torch.bfloat16), torch.cat(rows).to(grid.device), ids, weights, here)
        )
    wrong = torch.zeros(3, dtype=torch.int64, device=grid.device)
    window.exchange(max((c[0] for c in cases), key=lambda s: s.front_bytes))
    begin = time.perf_counter()
    for n in range(steps):
        step, rows, ids, weights, here = cases[(n * 3) % VARIANTS]
        exchange = window.exchange(step)
        mine = slice(exchange.first, exchange.first + exchange.tokens)
        exchange.dispatch(rows[mine], ids[mine], weights[mine], owner, local)
        arrived = exchange.rows(torch.bfloat16)
        wrong[0] += (exchange.topk_ids != here).sum() + (exchange.topk_weights != weights).sum()
        wrong[1] += ((arrived != rows) & (here >= 0).any(1)[:, None]).sum()
        exchange.weighted_home(slots_of(ExpertInput(arrived, exchange.topk_ids, exchange.topk_weights)))
        got = exchange.sum_ranks(ids[mine], owner)
        wrong[2] += (got != expected(rows[mine], ids[mine], weights[mine], placement, size)).sum()
    torch.cuda.synchronize()
    window.check()
    totals = [sum(column) for column in zip(*world.comm.all_gather_object(wrong.tolist()), strict=True)]
    seconds = time.perf_counter() - begin
    return {
        "steps": steps,
        "wrong": totals if any(totals) else [],
        "ms_a_step": round(seconds / max(1, steps) * 1e3, 3),
    }


def expected(x: Tensor, ids: Tensor, weights: Tensor, placement: Placement, size: int) -> Tensor:
    """The sum of all ranks' results for own tokens, each rounded to bfloat16, by the kernels of one GPU."""
    total = torch.zeros(x.shape, device=x.device)
    for r in range(size):
        local = placement.local_ids(ids, r)
        part = weighted_sum(slots_of(ExpertInput(x, local, weights)), weights, local, in_place=True)
        total += part.float()
    return total.to(x.dtype)


def lonely_dispatch(grid: ProcessGrid) -> Exchange:
    """Launch a dispatch of 16 tokens without asking the other ranks."""
    assert grid.peer_window is not None
    return lonely(grid.peer_window, grid, lonely_tokens(grid))


def lonely_tokens(grid: ProcessGrid) -> tuple[Tensor, ...]:
    """Rows, ids, weights, owner and local of 16 tokens."""
    placement = Placement.blocks(64, grid.moe.size).to(grid.device)
    x, routing = tokens_of(grid, 16, 2048, 64, 8, 1)
    owner, local = placement.owner.to(torch.int32), placement.local.to(torch.int32)
    return x, routing.topk_ids, routing.topk_weights, owner, local


def lonely(window: PeerWindow, grid: ProcessGrid, tables: tuple[Tensor, ...]) -> Exchange:
    exchange = window.exchange(Step((16,) * grid.moe.size, 8, 4096, 2048, torch.bfloat16))
    exchange.dispatch(*tables)
    return exchange


def late(world: World, grid: ProcessGrid, steps: int, seed: int) -> dict[str, Any]:
    """Rank 0 alone begins an exchange: it ends at the deadline, and in a second window by a peer's abort
    word."""
    found: dict[str, Any] = {"wrong": []}
    assert grid.peer_window is not None
    tables = lonely_tokens(grid)
    windows = [
        PeerWindow(grid.moe, grid.device, Deadlines(finish=seconds), grid.peer_window.access)
        for seconds in (0.2, 30.0)
    ]
    for window in windows:
        exchange = lonely(window, grid, tables)  # all together: compiled, and the window is open
        exchange.rows_home(torch.zeros(exchange.step.entries, 2048, dtype=torch.bfloat16, device=grid.device))
        torch.cuda.synchronize()
        world.comm.barrier()
    if world.rank == 0:
        begin = time.perf_counter()
        lonely(windows[0], grid, tables)
        while windows[0].problem() is None and time.perf_counter() - begin < 5:
            time.sleep(1e-4)
        found["deadline 200 ms, seen after ms"] = round((time.perf_counter() - begin) * 1e3, 1)
        found["report"] = windows[0].problem()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(10):
            lonely(windows[0], grid, tables)
        torch.cuda.synchronize()
        found["10 more launches, ms"] = round((time.perf_counter() - begin) * 1e3, 2)
        if "rank 1 has not sent its rows" not in str(found["report"]):
            found["wrong"].append(f"the report is {found['report']}")
    world.comm.barrier()
    if world.rank == 0:
        lonely(windows[1], grid, tables)
        time.sleep(0.3)
        world.comm.barrier()
        begin = time.perf_counter()
        torch.cuda.synchronize()
        found["abort by a peer, kernel over after ms"] = round((time.perf_counter() - begin) * 1e3, 2)
        found["abort report"] = windows[1].problem()
        if found["abort by a peer, kernel over after ms"] > 2000:
            found["wrong"].append("the abort word did not end the waiting")
    else:
        world.comm.barrier()
        if world.rank == 1:
            windows[1].abort()
        torch.cuda.synchronize()
    world.comm.barrier()
    for window in windows:
        with suppress(OSError):
            window.close()
    return found | {"pid": os.getpid()}

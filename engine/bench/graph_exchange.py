"""Dispatch and combine in CUDA graphs: one-sided stores beside an all-gather over NCCL.

In launched steps the host's time hides the exchange; inside a recording the GPU's time is all there is.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from xpar.comm.communicator import Communicator, Tag
from xpar.comm.device.backend import synchronize
from xpar.comm.device.peer_memory import PeerMemory
from xpar.comm.dispatch.base import Dispatcher
from xpar.comm.dispatch.choose import choose_dispatcher
from xpar.comm.grid import ProcessGrid
from xpar.comm.placement import Placement
from xpar.engine.layer.cuda_graph import rehearse
from xpar.kernels.contracts import ExpertInput, Routing
from xpar.kernels.row_format import RowFormat
from xpar.kernels.rows import decoded, encode_rows

NAMES = ("one-sided", "allgather")
LINK_BYTES = 256 << 20
"""Bytes of one copy that measures the link between two GPUs."""
COPIES = 8
CALLS, REPLAYS, ROUNDS = 10, 10, 5
"""Calls in one graph, replays of it in one measurement, and measurements, of which the median counts."""


@dataclass(frozen=True)
class Sizes:
    """``tokens`` of each rank, H, E and k of a layer; bfloat16."""

    tokens: int
    hidden_size: int
    num_experts: int
    top_k: int
    seed: int = 0


Clock = Callable[[Communicator, ProcessGrid, Callable[[], None]], float]


def measure_all(
    grid: ProcessGrid, sizes: Sequence[Sizes], forms: Sequence[RowFormat | None] = (None,)
) -> list[dict[str, Any]]:
    """Measure every one of ``sizes`` in each of ``forms``, beside the bandwidth of the link; collective.

    ``forms``: those in which rows travel to experts; None for numbers. ``link_us``: how long the rows that
    leave the busiest rank take at that bandwidth, one way. None where the ranks do not map each other's
    memory.
    """
    window = grid.peer_window
    link = None
    if window is not None and window.access.way is not None:
        link = link_gbs(grid.moe, grid.device, LINK_BYTES)
    results = []
    for size in sizes:
        for form in forms:
            result = measure(grid, size, _movers(grid, size), form=form)
            nbytes = max(grid.moe.all_gather_object(result["remote_rows"])) * result["row_bytes"]
            result |= {"link_gbs": link, "link_us": None if link is None else nbytes / link / 1e3}
            results.append(result)
    return results


def link_gbs(group: Communicator, device: torch.device, nbytes: int) -> float:
    """Measure the copies of ``nbytes`` from every rank to the next at once, 1e9 bytes a second; collective.

    The slowest rank's direction counts.
    """
    memory = PeerMemory.open(group, nbytes, device)
    target, spent = (group.rank + 1) % group.size, []
    for _ in range(ROUNDS):
        synchronize(device)
        group.barrier()
        begin = time.perf_counter()
        for _ in range(COPIES):
            memory.copy_to(target, nbytes)
        synchronize(device)
        spent.append(time.perf_counter() - begin)
    slowest = max(group.all_gather_object(statistics.median(spent)))
    memory.close()
    return float(COPIES * nbytes / slowest / 1e9)


def measure(
    grid: ProcessGrid,
    sizes: Sizes,
    movers: Sequence[Dispatcher],
    clock: "Clock | None" = None,
    form: RowFormat | None = None,
) -> dict[str, Any]:
    """Return microseconds of every one of ``movers``, and whether the results have the same bits.

    Collective. ``remote_rows``: those that must leave this rank. ``clock``: :func:`graph_us` by default.
    ``form``: of rows on their way to experts, or None; ``rel_error`` is what it changes in the results. Rows
    are quantised before ``dispatch`` and decoded after it; ``encode`` and ``round trip`` contain that.
    """
    clock = clock or graph_us
    result: dict[str, Any] = {
        "tokens_per_rank": sizes.tokens,
        "hidden_size": sizes.hidden_size,
        "num_experts": sizes.num_experts,
        "top_k": sizes.top_k,
        "ranks": grid.moe.size,
        "row_format": None if form is None else str(form),
        "row_bytes": sizes.hidden_size * torch.bfloat16.itemsize if form is None else form.nbytes,
    }
    results = []
    for mover in movers:
        case = _Case(mover, grid, sizes, clock, form)
        result |= {f"{mover.name} {what} us": us for what, us in case.times()}
        results.append(case.result().float())
    result["remote_rows"] = case.dispatcher_rows()
    same = all(torch.equal(results[0], other) for other in results[1:])
    result["same_bits"] = all(grid.moe.all_gather_object(same))
    exact = results[0] if form is None else _Case(movers[-1], grid, sizes, clock, None).result().float()
    error = float((results[0] - exact).norm() / exact.norm())
    result["rel_error"] = max(grid.moe.all_gather_object(error))
    return result


def _movers(grid: ProcessGrid, sizes: Sizes) -> list[Dispatcher]:
    """Make those of ``NAMES`` that serve ``grid``; there is always the all-gather."""
    movers = []
    for name in NAMES:
        placement = Placement.blocks(sizes.num_experts, grid.shape.ep, grid.shape.etp)
        if name != NAMES[0] or (grid.peer_window is not None and grid.peer_window.access.way is not None):
            movers.append(choose_dispatcher(grid, placement, name).dispatcher)
    return movers


class _Case:
    """A dispatcher with its tokens; an expert multiplies a row by its weight and number."""

    def __init__(
        self, mover: Dispatcher, grid: ProcessGrid, sizes: Sizes, clock: Clock, form: RowFormat | None
    ) -> None:
        generator = torch.Generator().manual_seed(sizes.seed + grid.moe.rank)
        x = torch.randn(sizes.tokens, sizes.hidden_size, generator=generator).to(torch.bfloat16)
        scores = torch.rand(sizes.tokens, sizes.num_experts, generator=generator)
        ids = scores.topk(sizes.top_k, 1).indices.to(torch.int32)
        weights = torch.rand(sizes.tokens, sizes.top_k, generator=generator)
        self.mover, self.grid, self.clock, self.form = mover, grid, clock, form
        mover.row_bytes = None if form is None else form.nbytes
        self.x = x.to(grid.device)
        self.rows = self._encode()
        self.routing = Routing(ids.to(grid.device), weights.to(grid.device))
        self.plan = self._plan()
        self.made = self._experts()

    def times(self) -> Iterator[tuple[str, float]]:
        """Yield (step, microseconds): encode, if rows are; dispatch with its ids; combine; all of them."""

        def encode() -> None:
            self._encode()

        def dispatch() -> None:
            self.mover.dispatch(self.rows, self._plan()).wait()

        def combine() -> None:
            self.mover.combine(self.made, self.plan).wait()

        def both() -> None:
            decoded(self._arrive(self._encode(), self._plan()), self.x.dtype)
            combine()

        steps = [("dispatch", dispatch), ("combine", combine), ("round trip", both)]
        if self.form is not None:
            steps.insert(0, ("encode", encode))
        for what, call in steps:
            yield what, self.clock(self.grid.moe, self.grid, call)

    def result(self) -> Tensor:
        """Return what comes home, launched."""
        plan = self._plan()
        self.mover.dispatch(self.rows, plan).wait()
        return self.mover.combine(self.made, plan).wait().tensor

    def dispatcher_rows(self) -> int:
        """Count the rows that leave this rank: one a token and other rank that has its experts."""
        placement = self.mover.placement
        owners = placement.owners(self.routing.topk_ids)
        here = self.grid.moe.rank // placement.etp
        return sum(int((owners == r).any(1).sum()) for r in range(placement.ep) if r != here) * placement.etp

    def _plan(self) -> Any:
        return self.mover.plan(
            self.routing, tag=Tag("bench"), hidden_size=self.x.shape[1], dtype=self.x.dtype
        )

    def _encode(self) -> Tensor:
        return self.x if self.form is None else encode_rows(self.x, self.form)

    def _arrive(self, rows: Tensor, plan: Any) -> ExpertInput:
        """Dispatch ``rows``; return the experts' input, whose rows say their form."""
        return replace(self.mover.dispatch(rows, plan).wait(), row_format=self.form)

    def _experts(self) -> Tensor:
        arrived = decoded(self._arrive(self.rows, self.plan), self.x.dtype)
        here = arrived.topk_ids >= 0
        factor = (arrived.topk_weights * here * (arrived.topk_ids + 1)).sum(1)
        rows = torch.where(here.any(1)[:, None], arrived.hidden_states, 0)
        made = (rows.float() * factor[:, None]).to(self.x.dtype)
        self.mover.combine(made, self.plan).wait()
        return made


def graph_us(group: Communicator, grid: ProcessGrid, call: Callable[[], None]) -> float:
    """Return microseconds of a ``call`` in a CUDA graph of many, the slowest rank's; collective."""
    device = grid.device
    rehearse(call, 2, device)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    watch = grid.transport.watch if grid.transport is not None else None
    assert watch is not None
    with watch.paused(), torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    graph.replay()
    times = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize(device)
        group.barrier()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        torch.cuda.synchronize(device)
        times.append(float(begin.elapsed_time(end)) * 1e3 / (REPLAYS * CALLS))
    group.barrier()
    return float(max(group.all_gather_object(statistics.median(times))))

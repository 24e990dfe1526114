"""Dispatch and combine in CUDA graphs: one-sided stores beside an all-gather over NCCL.

In launched steps the host's time hides the exchange; inside a recording the GPU's time is all there is.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xpar.comm.communicator import Communicator, Tag
from xpar.comm.dispatch.base import Dispatcher
from xpar.comm.dispatch.choose import choose_dispatcher
from xpar.comm.grid import ProcessGrid
from xpar.comm.placement import Placement
from xpar.engine.layer.cuda_graph import rehearse
from xpar.kernels.contracts import Routing

NAMES = ("one-sided", "allgather")
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


def measure(grid: ProcessGrid, sizes: Sizes) -> dict[str, Any]:
    """Return microseconds of every dispatcher, and whether the results have the same bits; collective."""
    record: dict[str, Any] = {
        "tokens_per_rank": sizes.tokens,
        "hidden_size": sizes.hidden_size,
        "num_experts": sizes.num_experts,
        "top_k": sizes.top_k,
        "ranks": grid.moe.size,
    }
    results = []
    for name in NAMES:
        placement = Placement.blocks(sizes.num_experts, grid.shape.ep, grid.shape.etp)
        case = _Case(choose_dispatcher(grid, placement, name).dispatcher, grid, sizes)
        record |= {f"{name} {what} us": us for what, us in case.times()}
        results.append(case.result())
    record["remote_rows"] = case.dispatcher_rows()
    record["same_bits"] = all(grid.moe.all_gather_object(torch.equal(*results)))
    return record


class _Case:
    """A dispatcher with its tokens; an expert multiplies a row by its weight and number."""

    def __init__(self, mover: Dispatcher, grid: ProcessGrid, sizes: Sizes) -> None:
        generator = torch.Generator().manual_seed(sizes.seed + grid.moe.rank)
        x = torch.randn(sizes.tokens, sizes.hidden_size, generator=generator).to(torch.bfloat16)
        scores = torch.rand(sizes.tokens, sizes.num_experts, generator=generator)
        ids = scores.topk(sizes.top_k, 1).indices.to(torch.int32)
        weights = torch.rand(sizes.tokens, sizes.top_k, generator=generator)
        self.mover, self.grid = mover, grid
        self.x = x.to(grid.device)
        self.routing = Routing(ids.to(grid.device), weights.to(grid.device))
        self.plan = self._plan()
        self.made = self._experts()

    def times(self) -> Iterator[tuple[str, float]]:
        """Yield (step, microseconds): dispatch with the ids that it needs, combine, and both."""

        def dispatch() -> None:
            self.mover.dispatch(self.x, self._plan()).wait()

        def combine() -> None:
            self.mover.combine(self.made, self.plan).wait()

        def both() -> None:
            dispatch()
            combine()

        for what, call in (("dispatch", dispatch), ("combine", combine), ("round trip", both)):
            yield what, graph_us(self.grid.moe, self.grid, call)

    def result(self) -> Tensor:
        """Return what comes home, launched."""
        plan = self._plan()
        self.mover.dispatch(self.x, plan).wait()
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

    def _experts(self) -> Tensor:
        arrived = self.mover.dispatch(self.x, self.plan).wait()
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

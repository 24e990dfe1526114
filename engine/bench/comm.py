"""Every dispatcher on random routing: rows against the de-duplicated count, time against a bare ``MPI_Alltoallv``."""

import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from xpar.comm.communicator import Communicator, Tag
from xpar.comm.dispatch.base import Dispatcher, DispatchPlan, destination_mask
from xpar.comm.dispatch.choose import DISPATCHERS, choose_dispatcher, choose_dispatcher_class
from xpar.comm.dispatch.expected_traffic import expected_crossings, expected_rows
from xpar.comm.failure import agreed
from xpar.comm.grid import ProcessGrid
from xpar.comm.placement import Placement
from xpar.engine.bench.timing import Times
from xpar.kernels.contracts import ExpertInput, Routing
from xpar.kernels.rows import gather_rows

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
ROUNDS = 30


@dataclass(frozen=True)
class TokenTraffic:
    """One size of message. ``tokens``: of this rank; every rank has as many."""

    tokens: int
    hidden_size: int
    num_experts: int
    top_k: int
    dtype: torch.dtype
    seed: int


def tokens_for(megabytes: float, hidden_size: int, dtype: torch.dtype, rows_a_token: float) -> int:
    """Tokens whose rows make about ``megabytes`` (of 2^20 bytes)."""
    return max(1, round(megabytes * 2**20 / (hidden_size * dtype.itemsize * rows_a_token)))


def measure(
    traffic: TokenTraffic, grid: ProcessGrid, names: list[str], rounds: int = ROUNDS
) -> list[dict[str, Any]]:
    """One record a dispatcher; collective. Dispatch and combine are timed, the experts' work between them is not."""
    placement = Placement.blocks(traffic.num_experts, grid.shape.ep, grid.shape.etp)
    trials = [DispatchTrial(choose_dispatcher(grid, placement, name).dispatcher, traffic) for name in names]
    node_of = [grid.world.node_of[r] for r in grid.moe.world_ranks]
    bare = BareExchange(grid.moe, trials[0].routing, placement, traffic)
    steps = [[trial.step() for trial in trials] + [bare.step()] for _ in range(rounds + 2)][2:]
    return [
        _record(grid.moe, trial, [(row[i], row[-1]) for row in steps], node_of)
        for i, trial in enumerate(trials)
    ]


def usable(grid: ProcessGrid, num_experts: int, names: list[str]) -> list[str]:
    """``names``, or those of all dispatchers that serve ``grid`` and send something; ValueError if one does not."""
    placement = Placement.blocks(num_experts, grid.shape.ep, grid.shape.etp)

    def works(name: str) -> bool:
        try:
            choose_dispatcher_class(grid, placement, name)
        except ValueError:
            return False
        return True

    for name in names:
        choose_dispatcher_class(grid, placement, name)
    moving = [cls.name for cls in DISPATCHERS if cls.capabilities.moves_rows(grid.world.num_nodes)]
    return names or [name for name in moving if works(name)]


def deduplicated(topk_ids: Tensor, placement: Placement, node_of: list[int] | None) -> int:
    """Rows of [T, k] ``topk_ids``, counted one by one: one a rank that holds any of a token's experts, or one a node."""
    ranks = destination_mask(topk_ids, placement)
    if node_of is None:
        return int(ranks.sum())
    nodes = torch.tensor(node_of)
    return sum(int(ranks[nodes == node].any(dim=0).sum()) for node in set(node_of))


class DispatchTrial:
    """One dispatcher with its input. The experts are the identity, so that the result is known: x times its weights."""

    def __init__(self, dispatcher: Dispatcher, traffic: TokenTraffic) -> None:
        self.dispatcher, self.traffic = dispatcher, traffic
        generator = torch.Generator().manual_seed(traffic.seed + dispatcher.group.rank)
        self.x = torch.randn(traffic.tokens, traffic.hidden_size, generator=generator).to(traffic.dtype)
        self.routing = random_routing(traffic, generator)
        self.plan: DispatchPlan | None = None
        self.error = 0.0

    def step(self) -> tuple[float, float, float]:
        """Seconds of plan, dispatch, combine on this rank."""
        group, t = self.dispatcher.group, self.traffic
        group.barrier()
        begin = time.perf_counter()
        plan = self.dispatcher.plan(self.routing, tag=Tag("bench"), hidden_size=t.hidden_size, dtype=t.dtype)
        planned = time.perf_counter()
        group.barrier()
        start = time.perf_counter()
        arrived = self.dispatcher.dispatch(self.x, plan).wait()
        dispatched = time.perf_counter()
        outputs = identity_experts(
            arrived, self.dispatcher.output(plan, arrived.topk_ids.shape[0], arrived.hidden_states)
        )
        group.barrier()
        back = time.perf_counter()
        result = self.dispatcher.combine(outputs, plan).wait().tensor
        end = time.perf_counter()
        expected = self.x.float() * self.routing.topk_weights.sum(1, keepdim=True)
        self.error = max(self.error, float((result.float() - expected).norm() / expected.norm()))
        self.plan = plan
        return planned - begin, dispatched - start, end - back


class BareExchange:
    """The same rows through ``MPI_Alltoallv`` there and back, from and to memory that is ready: the bound to meet."""

    def __init__(
        self, group: Communicator, routing: Routing, placement: Placement, traffic: TokenTraffic
    ) -> None:
        self.group = group
        self.send = destination_mask(routing.topk_ids, placement).sum(1).tolist()
        mine = torch.tensor(self.send)
        self.recv = group.all_to_all_v(mine, [1] * group.size, [1] * group.size).wait().tolist()
        width = traffic.hidden_size
        self.leaving = torch.ones(sum(self.send), width, dtype=traffic.dtype)
        self.arriving = torch.ones(sum(self.recv), width, dtype=traffic.dtype)

    def step(self) -> tuple[float, float, float]:
        """Seconds of nothing, there, and back."""
        self.group.barrier()
        begin = time.perf_counter()
        self.group.all_to_all_v(self.leaving, self.send, self.recv, out=self.arriving).wait()
        there = time.perf_counter()
        self.group.barrier()
        back = time.perf_counter()
        self.group.all_to_all_v(self.arriving, self.recv, self.send, out=self.leaving).wait()
        return 0.0, there - begin, time.perf_counter() - back


def random_routing(traffic: TokenTraffic, generator: torch.Generator) -> Routing:
    """Uniform and distinct experts, weights that add up to one."""
    scores = torch.rand(traffic.tokens, traffic.num_experts, generator=generator)
    weights = torch.rand(traffic.tokens, traffic.top_k, generator=generator) + 0.1
    return Routing(scores.topk(traffic.top_k).indices.to(torch.int32), weights / weights.sum(1, keepdim=True))


def identity_experts(arrived: ExpertInput, out: Tensor | None) -> Tensor:
    """Each row times the sum of its local weights."""
    rows = arrived.hidden_states if arrived.rows is None else gather_rows(arrived.hidden_states, arrived.rows)
    weights = arrived.topk_weights.masked_fill(arrived.topk_ids < 0, 0.0).sum(1, keepdim=True)
    outputs = (rows.float() * weights).to(rows.dtype)
    return outputs if out is None else out.copy_(outputs)


def _record(
    group: Communicator,
    trial: DispatchTrial,
    steps: list[tuple[tuple[float, ...], tuple[float, ...]]],
    node_of: list[int],
) -> dict[str, Any]:
    plan, placement = trial.plan, trial.dispatcher.placement
    assert plan is not None
    granularity = trial.dispatcher.capabilities.row_granularity
    by_node = granularity == "node"
    across = sum(n for n, node in zip(plan.traffic.sent, node_of, strict=True) if node != node_of[group.rank])
    everyone = group.all_gather_object(
        (
            steps,
            plan.traffic.rows,
            plan.traffic.combined_rows,
            deduplicated(trial.routing.topk_ids, placement, node_of if by_node else None),
            trial.error,
            across,
        )
    )
    slowest = [
        [[max(r[0][s][w][i] for r in everyone) for i in range(3)] for w in range(2)]
        for s in range(len(steps))
    ]
    ours = Times(tuple(s[0][1] + s[0][2] for s in slowest))
    bare = Times(tuple(s[1][1] + s[1][2] for s in slowest))
    row_bytes = trial.traffic.hidden_size * trial.traffic.dtype.itemsize
    rows = sum(r[1] for r in everyone)
    return {
        "dispatcher": trial.dispatcher.name,
        "row_granularity": granularity,
        "tokens_per_rank": trial.traffic.tokens,
        "rows": rows,
        "rows_deduplicated": sum(r[3] for r in everyone),
        "rows_expected": expected_rows(
            trial.traffic.num_experts, trial.traffic.top_k, len(set(node_of)) if by_node else group.size
        )
        * trial.traffic.tokens
        * group.size,
        "rows_across_nodes": sum(r[5] for r in everyone),
        "rows_across_expected": expected_crossings(
            trial.traffic.num_experts, trial.traffic.top_k, placement.etp, node_of, by_node
        )
        * trial.traffic.tokens
        * group.size,
        "rows_back": sum(r[2] for r in everyone),
        "bytes_per_rank": rows * row_bytes / group.size,
        "plan_ms": statistics.median(s[0][0] for s in slowest) * 1e3,
        "dispatch_ms": statistics.median(s[0][1] for s in slowest) * 1e3,
        "combine_ms": statistics.median(s[0][2] for s in slowest) * 1e3,
        "bare_alltoallv_ms": bare.median_ms,
        "ratio_to_bare": bare.ratio(ours),
        "rel_error": max(r[4] for r in everyone),
    }


def run(
    base: TokenTraffic, grid: ProcessGrid, megabytes: list[float], names: list[str]
) -> list[dict[str, Any]]:
    """All sizes, all dispatchers; collective."""
    rows = expected_rows(base.num_experts, base.top_k, grid.moe.size)
    names = agreed(grid.world.comm, lambda: usable(grid, base.num_experts, names), "bench comm")
    records = []
    for size in megabytes:
        traffic = replace(base, tokens=tokens_for(size, base.hidden_size, base.dtype, rows))
        records += [{"megabytes": size, **record} for record in measure(traffic, grid, names)]
    return records

"""Every dispatcher on random routing, beside a bare ``MPI_Alltoallv`` of the same rows.

Each row of a token is sent once to each rank, or node, that holds any of its experts: the de-duplicated rows.
"""

import statistics
import time
from collections.abc import Sequence
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
from xpar.kernels.row_format import RowFormat
from xpar.kernels.rows import decoded, encode_rows, gather_rows

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest relative error of a result."""
CODES_TOLERANCE = 4e-2
"""The same where rows travelled as e4m3 codes, which round with 2.6e-2."""
ROUNDS = 30
"""Number of measured rounds; two before are not measured."""


@dataclass(frozen=True)
class TokenTraffic:
    """The tokens of one measurement, and how they are routed.

    ``tokens``: of each rank. ``top_k``: experts per token. ``seed``: of tokens and routing.
    """

    tokens: int
    hidden_size: int
    num_experts: int
    top_k: int
    dtype: torch.dtype
    seed: int


def count_tokens(megabytes: float, hidden_size: int, dtype: torch.dtype, rows_per_token: float) -> int:
    """Return the number of tokens whose rows make about ``megabytes`` MB of 2^20 bytes."""
    return max(1, round(megabytes * 2**20 / (hidden_size * dtype.itemsize * rows_per_token)))


def measure(
    traffic: TokenTraffic,
    grid: ProcessGrid,
    names: list[str],
    rounds: int = ROUNDS,
    forms: Sequence[RowFormat | None] = (None,),
) -> list[dict[str, Any]]:
    """Measure dispatch and combine, without the experts, of each dispatcher of ``names``; collective.

    ``forms``: the forms in which rows travel; None for numbers.
    """
    placement = Placement.blocks(traffic.num_experts, grid.shape.ep, grid.shape.etp)
    trials = [
        DispatchTrial(choose_dispatcher(grid, placement, name).dispatcher, traffic, form)
        for name in names
        for form in forms
    ]
    node_of = [grid.world.node_of[r] for r in grid.moe.world_ranks]
    bare = BareExchange(grid.moe, trials[0].routing, placement, traffic)
    steps = [[trial.step() for trial in trials] + [bare.step()] for _ in range(rounds + 2)][2:]
    return [
        _collect_result(grid.moe, trial, [(row[i], row[-1]) for row in steps], node_of)
        for i, trial in enumerate(trials)
    ]


def choose_names(grid: ProcessGrid, num_experts: int, names: list[str]) -> list[str]:
    """Return ``names``, or all dispatchers that send something; ValueError if one cannot serve."""
    placement = Placement.blocks(num_experts, grid.shape.ep, grid.shape.etp)

    def serves(name: str) -> bool:
        try:
            choose_dispatcher_class(grid, placement, name)
        except ValueError:
            return False
        return True

    for name in names:
        choose_dispatcher_class(grid, placement, name)
    moving = [cls.name for cls in DISPATCHERS if cls.capabilities.moves_rows(grid.world.num_nodes)]
    return names or [name for name in moving if serves(name)]


def count_deduplicated(topk_ids: Tensor, placement: Placement, node_of: list[int] | None) -> int:
    """Count the rows that ``topk_ids`` [T, k] need: one per token and rank, or per token and node."""
    ranks = destination_mask(topk_ids, placement)
    if node_of is None:
        return int(ranks.sum())
    nodes = torch.tensor(node_of)
    return sum(int(ranks[nodes == node].any(dim=0).sum()) for node in set(node_of))


class DispatchTrial:
    """One dispatcher with its input.

    The experts are the identity, so that the result is known: each token times the sum of its weights.
    ``error``: the largest relative error so far. ``form``: that of rows on their way to experts, or None.
    """

    def __init__(self, dispatcher: Dispatcher, traffic: TokenTraffic, form: RowFormat | None = None) -> None:
        self.dispatcher, self.traffic, self.form = dispatcher, traffic, form
        self.row_bytes = traffic.hidden_size * traffic.dtype.itemsize if form is None else form.nbytes
        dispatcher.row_bytes = None if form is None else form.nbytes
        generator = torch.Generator().manual_seed(traffic.seed + dispatcher.group.rank)
        self.x = torch.randn(traffic.tokens, traffic.hidden_size, generator=generator).to(traffic.dtype)
        self.routing = random_routing(traffic, generator)
        self.plan: DispatchPlan | None = None
        self.error = 0.0

    def step(self) -> tuple[float, float, float]:
        """Run plan, dispatch and combine once; return the seconds of each on this rank. Collective."""
        group, t = self.dispatcher.group, self.traffic
        group.barrier()
        begin = time.perf_counter()
        plan = self.dispatcher.plan(self.routing, tag=Tag("bench"), hidden_size=t.hidden_size, dtype=t.dtype)
        planned = time.perf_counter()
        group.barrier()
        start = time.perf_counter()
        rows = self.x if self.form is None else encode_rows(self.x, self.form)
        arrived = replace(self.dispatcher.dispatch(rows, plan).wait(), row_format=self.form)
        arrived = decoded(arrived, t.dtype)
        dispatched = time.perf_counter()
        outputs = identity_experts(
            arrived, self.dispatcher.output(plan, arrived.topk_ids.shape[0], self.x[:0])
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
    """The same rows through ``MPI_Alltoallv`` there and back, between prepared buffers."""

    def __init__(
        self, group: Communicator, routing: Routing, placement: Placement, traffic: TokenTraffic
    ) -> None:
        self.group = group
        self.send = destination_mask(routing.topk_ids, placement).sum(1).tolist()
        mine = torch.tensor(self.send)
        self.recv = group.all_to_all_v(mine, [1] * group.size, [1] * group.size).wait().tolist()
        width = traffic.hidden_size
        self.send_buffer = torch.ones(sum(self.send), width, dtype=traffic.dtype)
        self.recv_buffer = torch.ones(sum(self.recv), width, dtype=traffic.dtype)

    def step(self) -> tuple[float, float, float]:
        """Send the rows there and back; return the seconds of nothing, there, and back. Collective."""
        self.group.barrier()
        begin = time.perf_counter()
        self.group.all_to_all_v(self.send_buffer, self.send, self.recv, out=self.recv_buffer).wait()
        there = time.perf_counter()
        self.group.barrier()
        back = time.perf_counter()
        self.group.all_to_all_v(self.recv_buffer, self.recv, self.send, out=self.send_buffer).wait()
        return 0.0, there - begin, time.perf_counter() - back


def random_routing(traffic: TokenTraffic, generator: torch.Generator) -> Routing:
    """Draw uniform, distinct experts for each token, with weights that add up to one."""
    scores = torch.rand(traffic.tokens, traffic.num_experts, generator=generator)
    weights = torch.rand(traffic.tokens, traffic.top_k, generator=generator) + 0.1
    return Routing(scores.topk(traffic.top_k).indices.to(torch.int32), weights / weights.sum(1, keepdim=True))


def identity_experts(arrived: ExpertInput, out: Tensor | None) -> Tensor:
    """Multiply each row by the sum of its local weights; the result is in ``out``, if given."""
    rows = arrived.hidden_states if arrived.rows is None else gather_rows(arrived.hidden_states, arrived.rows)
    weights = arrived.topk_weights.masked_fill(arrived.topk_ids < 0, 0.0).sum(1, keepdim=True)
    outputs = (rows.float() * weights).to(rows.dtype)
    return outputs if out is None else out.copy_(outputs)


def _collect_result(
    group: Communicator,
    trial: DispatchTrial,
    steps: list[tuple[tuple[float, ...], tuple[float, ...]]],
    node_of: list[int],
) -> dict[str, Any]:
    """Collect the figures of one dispatcher from all ranks of ``group``; collective.

    ``steps``: for each round the seconds of this dispatcher's step and of the bare exchange's step. Returns
    rows and bytes of all ranks together, and times in ms of the slowest rank, as medians over the rounds.
    """
    plan, placement = trial.plan, trial.dispatcher.placement
    assert plan is not None
    granularity = trial.dispatcher.capabilities.row_granularity
    by_node = granularity == "node"
    across = sum(n for n, node in zip(plan.traffic.sent, node_of, strict=True) if node != node_of[group.rank])
    gathered = group.all_gather_object(
        (
            steps,
            plan.traffic.rows,
            plan.traffic.combined_rows,
            count_deduplicated(trial.routing.topk_ids, placement, node_of if by_node else None),
            trial.error,
            across,
        )
    )
    slowest = [
        [[max(r[0][s][w][i] for r in gathered) for i in range(3)] for w in range(2)]
        for s in range(len(steps))
    ]
    ours = Times(tuple(s[0][1] + s[0][2] for s in slowest))
    bare = Times(tuple(s[1][1] + s[1][2] for s in slowest))
    rows = sum(r[1] for r in gathered)
    return {
        "dispatcher": trial.dispatcher.name,
        "row_format": None if trial.form is None else str(trial.form),
        "row_bytes": trial.row_bytes,
        "tokens_per_rank": trial.traffic.tokens,
        "rows": rows,
        "row_granularity": granularity,
        "rows_deduplicated": sum(r[3] for r in gathered),
        "rows_expected": expected_rows(
            trial.traffic.num_experts, trial.traffic.top_k, len(set(node_of)) if by_node else group.size
        )
        * trial.traffic.tokens
        * group.size,
        "rows_across_nodes": sum(r[5] for r in gathered),
        "rows_across_expected": expected_crossings(
            trial.traffic.num_experts, trial.traffic.top_k, placement.etp, node_of, by_node
        )
        * trial.traffic.tokens
        * group.size,
        "rows_back": sum(r[2] for r in gathered),
        "bytes_per_rank": rows * trial.row_bytes / group.size,
        "plan_ms": statistics.median(s[0][0] for s in slowest) * 1e3,
        "dispatch_ms": statistics.median(s[0][1] for s in slowest) * 1e3,
        "combine_ms": statistics.median(s[0][2] for s in slowest) * 1e3,
        "bare_alltoallv_ms": bare.median_ms,
        "ratio_to_bare": bare.ratio(ours),
        "rel_error": max(r[4] for r in gathered),
    }


def measure_sizes(
    base: TokenTraffic,
    grid: ProcessGrid,
    megabytes: list[float],
    names: list[str],
    forms: Sequence[RowFormat | None] = (None,),
) -> list[dict[str, Any]]:
    """Measure every dispatcher at every size, in MB of 2^20 bytes a rank; collective.

    ``base``: the traffic, whose tokens follow from each size. ``names``: empty for all that serve ``grid``.
    ``forms``: as for :func:`measure`; the sizes are those of rows as numbers.
    """
    rows = expected_rows(base.num_experts, base.top_k, grid.moe.size)
    names = agreed(grid.world.comm, lambda: choose_names(grid, base.num_experts, names), "bench comm")
    results = []
    for size in megabytes:
        traffic = replace(base, tokens=count_tokens(size, base.hidden_size, base.dtype, rows))
        results += [{"megabytes": size, **result} for result in measure(traffic, grid, names, forms=forms)]
    return results

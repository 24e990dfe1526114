"""Dispatch by an all-gather of the tokens; each rank reads the rows that its experts need.

Every rank learns every token's experts, so the way back needs no counts from other ranks: only computed rows
come back. On a GPU the host would have to wait even for counts that it could derive. There every rank
computes an output for every token, zero for tokens without an expert on it, and the outputs are
reduce-scattered: nothing depends on a number that only the GPU knows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from xpar.comm.communicator import Communicator, Pending, Tag
from xpar.comm.dispatch.alltoall import (
    AllToAllPlan,
    local_ids_at_destination,
    return_rows,
    returning_slots,
    rows_by_destination,
    sum_per_rank,
)
from xpar.comm.dispatch.base import (
    Capabilities,
    Dispatcher,
    DispatchPlan,
    DispatchRequest,
    Traffic,
    agree_on_plan,
    decode_routing,
    encode_routing,
    pad_missing_outputs,
)
from xpar.comm.grid import ProcessGrid
from xpar.comm.placement import Placement
from xpar.comm.reduction import Distributed, Full
from xpar.kernels.contracts import ExpertInput, Routing

SMALL_GROUP = 4
"""ranks; up to this many an all-gather moves about the bytes of the de-duplicated all-to-all (k near R)"""


@dataclass(frozen=True)
class GatheredTokens:
    """The plan in which the tokens of all ranks are entries; ``counts`` of each rank.

    ``arrived``: local ids and weights of every token of every rank.
    """

    arrived: Routing
    counts: list[int]


class AllGatherDispatcher(Dispatcher):
    """A dispatcher for small groups, or k near the ranks: all-to-all's bytes, fewer messages.

    ``whole``: compute and reduce all tokens rather than those that have an expert here; by default on a GPU.
    """

    name = "allgather"
    capabilities = Capabilities(
        ("cpu", "cuda"), needs_host_counts=False, graph_capture=True, row_granularity="all"
    )

    def __init__(self, group: Communicator, placement: Placement, whole: bool | None = None) -> None:
        self.group, self.placement = group, placement
        self.whole = placement.device.type == "cuda" if whole is None else whole

    @classmethod
    def unsuitable(cls, grid: ProcessGrid, placement: Placement, request: DispatchRequest) -> str | None:
        if grid.moe.size <= SMALL_GROUP:
            return None
        return f"{grid.moe.size} ranks; more than {SMALL_GROUP} move fewer bytes with alltoall"

    @classmethod
    def build(cls, grid: ProcessGrid, placement: Placement) -> Dispatcher:
        return cls(grid.moe, placement)

    def plan(
        self,
        routing: Routing | BaseException,
        *,
        tag: Tag,
        hidden_size: int,
        dtype: torch.dtype,
        exact: bool = False,
    ) -> DispatchPlan:
        own, counts = agree_on_plan(self, routing, tag, hidden_size, dtype, exact)
        gathered = decode_routing(self.group.all_gather_v(encode_routing(own), counts))
        size, tokens = self.group.size, own.topk_ids.shape[0]
        sent = [tokens] * size
        if self.whole and not exact:
            local = self.placement.local_ids(gathered.topk_ids, self.placement.ep_rank(self.group.rank))
            whole = GatheredTokens(Routing(local, gathered.topk_weights), counts)
            return DispatchPlan(own, exact, Traffic.of(self.group.rank, sent, tokens * size), whole)
        state = plan_from_gathered(own, gathered, counts, self.placement, self.group.rank, exact)
        traffic = Traffic.of(self.group.rank, sent, sum(state.back_recv))
        return DispatchPlan(own, exact, traffic, (state, counts))

    def dispatch(self, hidden_states: Tensor, plan: DispatchPlan) -> Pending[ExpertInput]:
        if isinstance(plan.dispatcher_state, GatheredTokens):
            return self._dispatch_whole(hidden_states, plan.dispatcher_state)
        state, counts = plan.dispatcher_state
        tokens = self.group.all_gather_v(hidden_states, counts)
        arrived: Routing = state.arrived
        return Pending(lambda: ExpertInput(tokens, arrived.topk_ids, arrived.topk_weights, state.rows))

    def combine(self, outputs: Tensor, plan: DispatchPlan) -> Pending[Distributed]:
        if isinstance(plan.dispatcher_state, GatheredTokens):
            counts = plan.dispatcher_state.counts
            own = self.group.reduce_scatter_v(pad_missing_outputs(outputs, sum(counts)), counts, planned=True)
            return Pending(lambda: Distributed(own, Full()))
        return return_rows(self.group, outputs, plan.dispatcher_state[0], plan.local_routing)

    def _dispatch_whole(self, hidden_states: Tensor, whole: GatheredTokens) -> Pending[ExpertInput]:
        tokens = self.group.all_gather_v(hidden_states, whole.counts)
        return Pending(lambda: ExpertInput(tokens, whole.arrived.topk_ids, whole.arrived.topk_weights))


def plan_from_gathered(
    own: Routing, gathered: Routing, counts: list[int], placement: Placement, rank: int, exact: bool
) -> AllToAllPlan:
    """Derive the plan that all-to-all learns by asking, from the routing of all ranks' tokens."""
    destination, tokens, send = rows_by_destination(own.topk_ids, placement)
    local = placement.local_ids(gathered.topk_ids, placement.ep_rank(rank))
    rows = (local >= 0).any(dim=1).nonzero()[:, 0]
    home = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(rows.device)
    recv = torch.bincount(home[rows], minlength=len(counts)).tolist()
    arrived = Routing(local[rows], gathered.topk_weights[rows])
    if not exact:
        return AllToAllPlan(tokens, arrived, send, recv, recv, send, None, rows)
    is_active = local_ids_at_destination(own.topk_ids, destination, tokens, placement) >= 0
    slots, back_recv = returning_slots(is_active, tokens, send)
    back_send = sum_per_rank((arrived.topk_ids >= 0).sum(1), recv)
    return AllToAllPlan(tokens, arrived, send, recv, back_send, back_recv, slots, rows)

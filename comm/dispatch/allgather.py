"""All-gather the tokens; each rank reads the rows its experts need, and only those come back.

Every rank learns every token's ids, so the way back needs no counts from anybody. On a GPU even those that it could
derive would have to be waited for; there every rank computes an output for every token, zero where it has no expert
of it, and the outputs are reduce-scattered: nothing depends on a number that only the GPU knows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from xpar.comm.communicator import Communicator, Pending
from xpar.comm.dispatch.alltoall import AllToAllPlan, destinations, per_rank, return_rows, slots_back
from xpar.comm.dispatch.base import (
    Capabilities,
    DispatchPlan,
    Traffic,
    agree_on_plan,
    decode_routing,
    encode_routing,
    every_entry,
)
from xpar.comm.dispatch.outgoing_rows import local_ids_at_destination
from xpar.comm.handshake import Tag
from xpar.comm.placement import Placement
from xpar.comm.reduction import Distributed, Full
from xpar.kernels.contracts import ExpertInput, Routing


@dataclass(frozen=True)
class GatheredTokens:
    """All tokens of all ranks are entries. ``arrived``: local ids and weights of each; ``counts``: tokens per rank."""

    arrived: Routing
    counts: list[int]


class AllGatherDispatcher:
    """For small groups, and for k near the number of ranks: as many bytes as all-to-all, fewer messages.

    ``whole``: compute and reduce all tokens rather than those that have an expert here; by default on a GPU.
    """

    name = "allgather"
    capabilities = Capabilities(("cpu", "cuda"), needs_host_counts=False, graph_capture=True)

    def __init__(self, group: Communicator, placement: Placement, whole: bool | None = None) -> None:
        self.group, self.placement = group, placement
        self.whole = placement.device.type == "cuda" if whole is None else whole

    def plan(
        self,
        routing: Routing | BaseException,
        *,
        tag: Tag,
        hidden_size: int,
        dtype: torch.dtype,
        exact: bool = False,
    ) -> DispatchPlan:
        own, counts = agree_on_plan(self.group, self.name, routing, tag, hidden_size, dtype, exact)
        everyone = decode_routing(self.group.all_gather_v(encode_routing(own), counts))
        size, tokens = self.group.size, own.topk_ids.shape[0]
        sent = [tokens] * size
        if self.whole and not exact:
            local = self.placement.local_ids(everyone.topk_ids, self.group.rank // self.placement.etp)
            whole = GatheredTokens(Routing(local, everyone.topk_weights), counts)
            return DispatchPlan(own, exact, Traffic.of(self.group.rank, sent, tokens * size), whole)
        detail = gathered_detail(own, everyone, counts, self.placement, self.group.rank, exact)
        traffic = Traffic.of(self.group.rank, sent, sum(detail.back_recv))
        return DispatchPlan(own, exact, traffic, (detail, counts))

    def dispatch(self, hidden_states: Tensor, plan: DispatchPlan) -> Pending[ExpertInput]:
        if isinstance(plan.detail, GatheredTokens):
            return self._dispatch_whole(hidden_states, plan.detail)
        detail, counts = plan.detail
        everything = self.group.all_gather_v(hidden_states, counts)
        arrived: Routing = detail.arrived
        return Pending(lambda: ExpertInput(everything, arrived.topk_ids, arrived.topk_weights, detail.rows))

    def output(self, plan: DispatchPlan, rows: int, like: Tensor) -> Tensor | None:
        return None

    def combine(self, outputs: Tensor, plan: DispatchPlan) -> Pending[Distributed]:
        if isinstance(plan.detail, GatheredTokens):
            counts = plan.detail.counts
            mine = self.group.reduce_scatter_v(every_entry(outputs, sum(counts)), counts)
            return Pending(lambda: Distributed(mine, Full()))
        return return_rows(self.group, outputs, plan.detail[0], plan.own)

    def _dispatch_whole(self, hidden_states: Tensor, whole: GatheredTokens) -> Pending[ExpertInput]:
        everything = self.group.all_gather_v(hidden_states, whole.counts)
        return Pending(lambda: ExpertInput(everything, whole.arrived.topk_ids, whole.arrived.topk_weights))


def gathered_detail(
    own: Routing, everyone: Routing, counts: list[int], placement: Placement, rank: int, exact: bool
) -> AllToAllPlan:
    """What :class:`AllToAllDispatcher` learns by asking, derived from everyone's routing."""
    destination, tokens, send = destinations(own.topk_ids, placement)
    local = placement.local_ids(everyone.topk_ids, rank // placement.etp)
    rows = (local >= 0).any(dim=1).nonzero()[:, 0]
    home = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(rows.device)
    recv = torch.bincount(home[rows], minlength=len(counts)).tolist()
    arrived = Routing(local[rows], everyone.topk_weights[rows])
    if not exact:
        return AllToAllPlan(tokens, arrived, send, recv, recv, send, None, rows)
    there = local_ids_at_destination(own.topk_ids, destination, tokens, placement) >= 0
    slots, back_recv = slots_back(there, tokens, send)
    back_send = per_rank((arrived.topk_ids >= 0).sum(1), recv)
    return AllToAllPlan(tokens, arrived, send, recv, back_send, back_recv, slots, rows)

"""All-gather the tokens; each rank reads the rows its experts need, and only those come back.

Every rank learns every token's ids, so the way back needs no counts from anybody.
"""

import torch
from torch import Tensor

from xpar.comm.communicator import Communicator, Pending
from xpar.comm.dispatch.alltoall import Detail, destinations, per_rank, return_rows, slots_back
from xpar.comm.dispatch.base import DispatchPlan, Traffic, agree, pack, unpack
from xpar.comm.handshake import Tag
from xpar.comm.placement import Placement
from xpar.comm.reduction import Distributed
from xpar.kernels.contracts import ExpertInput, Routing


class AllGatherDispatcher:
    """For small groups, and for k near the number of ranks: as many bytes as all-to-all, fewer messages."""

    name = "allgather"

    def __init__(self, group: Communicator, placement: Placement) -> None:
        self.group, self.placement = group, placement

    def plan(
        self,
        routing: Routing | BaseException,
        *,
        tag: Tag,
        hidden_size: int,
        dtype: torch.dtype,
        exact: bool = False,
    ) -> DispatchPlan:
        own, counts = agree(self.group, self.name, routing, tag, hidden_size, dtype, exact)
        everyone = unpack(self.group.all_gather_v(pack(own), counts))
        detail = gathered_detail(own, everyone, counts, self.placement, self.group.rank, exact)
        others = self.group.size - 1
        tokens = own.topk_ids.shape[0]
        traffic = Traffic(tokens * (others + 1), tokens * others, sum(detail.back_recv))
        return DispatchPlan(own, exact, traffic, (detail, counts))

    def dispatch(self, hidden_states: Tensor, plan: DispatchPlan) -> Pending[ExpertInput]:
        detail, counts = plan.detail
        everything = self.group.all_gather_v(hidden_states, counts)
        arrived: Routing = detail.arrived
        return Pending(lambda: ExpertInput(everything, arrived.topk_ids, arrived.topk_weights, detail.rows))

    def output(self, plan: DispatchPlan, rows: int, like: Tensor) -> Tensor | None:
        return None

    def combine(self, outputs: Tensor, plan: DispatchPlan) -> Distributed:
        return return_rows(self.group, outputs, plan.detail[0], plan.own)


def gathered_detail(
    own: Routing, everyone: Routing, counts: list[int], placement: Placement, rank: int, exact: bool
) -> Detail:
    """What :class:`AllToAllDispatcher` learns by asking, derived from everyone's routing."""
    destination, tokens, send = destinations(own.topk_ids, placement)
    local = placement.local_ids(everyone.topk_ids, rank // placement.etp)
    rows = (local >= 0).any(dim=1).nonzero()[:, 0]
    home = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    recv = torch.bincount(home[rows], minlength=len(counts)).tolist()
    arrived = Routing(local[rows], everyone.topk_weights[rows])
    if not exact:
        return Detail(tokens, arrived, send, recv, recv, send, None, rows)
    slots, back_recv = slots_back(own.topk_ids, destination, tokens, send, placement)
    back_send = per_rank((arrived.topk_ids >= 0).sum(1), recv)
    return Detail(tokens, arrived, send, recv, back_send, back_recv, slots, rows)

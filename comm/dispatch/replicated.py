"""Dispatch without movement: every rank holds all tokens and makes a partial sum."""

import zlib

import torch
from torch import Tensor

from xpar.comm.communicator import Communicator, Pending, Tag
from xpar.comm.dispatch.base import (
    Capabilities,
    Dispatcher,
    DispatchPlan,
    DispatchRequest,
    Traffic,
    agree_on_plan,
    pad_missing_outputs,
)
from xpar.comm.grid import ProcessGrid
from xpar.comm.handshake import handshake
from xpar.comm.placement import Placement
from xpar.comm.reduction import Distributed, Full, Partial
from xpar.kernels.contracts import ExpertInput, Routing
from xpar.kernels.rows import weighted_sum


class ReplicatedDispatcher(Dispatcher):
    """A dispatcher for groups whose ranks hold the same tokens, and for groups of one rank."""

    name = "replicated"
    capabilities = Capabilities(
        ("cpu", "cuda"), needs_host_counts=True, graph_capture=False, replicated_tokens=True
    )

    def __init__(self, group: Communicator, placement: Placement) -> None:
        self.group, self.placement = group, placement

    @classmethod
    def impossible(cls, grid: ProcessGrid, placement: Placement, request: DispatchRequest) -> str | None:
        has_copies = grid.moe.world_ranks == grid.tp.world_ranks and not request.sequence_parallel
        if grid.moe.size == 1 or has_copies:
            return None
        why = "sequence parallel" if request.sequence_parallel else f"tp={grid.shape.tp}"
        return f"the {grid.moe.size} ranks of an expert group hold different tokens ({why})"

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
        own, _ = agree_on_plan(self, routing, tag, hidden_size, dtype, exact)
        if self.group.size == 1:
            tokens = own.topk_ids.shape[0]
            return DispatchPlan(own, exact, Traffic.of(0, [tokens], tokens), None)
        # Ranks whose copies of the tokens have drifted apart would add up parts of different answers.
        digest = zlib.crc32(own.topk_ids.contiguous().cpu().numpy().tobytes())
        same = {"tokens": own.topk_ids.shape[0], "topk_ids_crc32": digest}
        handshake(self.group, Tag("replicated tokens", tag.layer, tag.step), same=same)
        traffic = Traffic.of(0, [0] * self.group.size, 0)
        return DispatchPlan(own, exact, traffic, None)

    def dispatch(self, hidden_states: Tensor, plan: DispatchPlan) -> Pending[ExpertInput]:
        routing = plan.local_routing
        local = self.placement.local_ids(routing.topk_ids, self._ep_rank())
        if self.group.size == 1 or plan.exact or _computes_all_tokens(hidden_states):
            entries = ExpertInput(hidden_states, local, routing.topk_weights)
        else:
            rows = (local >= 0).any(dim=1).nonzero()[:, 0]
            entries = ExpertInput(hidden_states, local[rows], routing.topk_weights[rows], rows)
        return Pending(lambda: entries)

    def combine(self, outputs: Tensor, plan: DispatchPlan) -> Pending[Distributed]:
        return Pending(lambda: self._sum(outputs, plan))

    def _sum(self, outputs: Tensor, plan: DispatchPlan) -> Distributed:
        topk_ids = plan.local_routing.topk_ids
        if plan.exact:
            return Distributed(self._sum_in_slot_order(outputs, plan), Full())
        if self.group.size == 1:
            return Distributed(outputs, Full())
        if _computes_all_tokens(outputs):
            return Distributed(pad_missing_outputs(outputs, topk_ids.shape[0]), Partial(self.group))
        rows = (self.placement.owners(topk_ids) == self._ep_rank()).any(dim=1).nonzero()[:, 0]
        total = outputs.new_zeros(topk_ids.shape[0], outputs.shape[1])
        total[rows] = outputs
        return Distributed(total, Partial(self.group))

    def _sum_in_slot_order(self, outputs: Tensor, plan: DispatchPlan) -> Tensor:
        positions, counts = self.placement.slot_order(plan.local_routing.topk_ids)
        if self.group.size > 1:
            outputs = self.group.all_gather_v(outputs, counts)
        return weighted_sum(outputs, plan.local_routing.topk_weights, positions)

    def _ep_rank(self) -> int:
        return self.placement.ep_rank(self.group.rank)


def _computes_all_tokens(x: Tensor) -> bool:
    """Return whether the experts get all tokens: on a GPU, picking some would make the host wait."""
    return x.is_cuda

"""No movement: every rank holds all tokens and computes its own experts; the result is a partial sum."""

import zlib

import torch
from torch import Tensor

from xpar.comm.communicator import Communicator, Pending
from xpar.comm.dispatch.base import Capabilities, DispatchPlan, Traffic, agree_on_plan, every_entry
from xpar.comm.handshake import Tag, handshake
from xpar.comm.placement import Placement
from xpar.comm.reduction import Distributed, Full, Partial
from xpar.kernels.contracts import ExpertInput, Routing
from xpar.kernels.rows import weighted_sum


class ReplicatedDispatcher:
    """Serves groups whose ranks hold the same tokens, and groups of one."""

    name = "replicated"
    capabilities = Capabilities(("cpu", "cuda"), needs_host_counts=True, graph_capture=False)

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
        own, _ = agree_on_plan(self.group, self.name, routing, tag, hidden_size, dtype, exact)
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
        local = self.placement.local_ids(plan.own.topk_ids, self._ep_rank())
        if self.group.size == 1 or plan.exact or _all_entries(hidden_states):
            entries = ExpertInput(hidden_states, local, plan.own.topk_weights)
        else:
            rows = (local >= 0).any(dim=1).nonzero()[:, 0]
            entries = ExpertInput(hidden_states, local[rows], plan.own.topk_weights[rows], rows)
        return Pending(lambda: entries)

    def output(self, plan: DispatchPlan, rows: int, like: Tensor) -> Tensor | None:
        return None

    def combine(self, outputs: Tensor, plan: DispatchPlan) -> Pending[Distributed]:
        return Pending(lambda: self._sum(outputs, plan))

    def _sum(self, outputs: Tensor, plan: DispatchPlan) -> Distributed:
        if plan.exact:
            return Distributed(self._in_slot_order(outputs, plan), Full())
        if self.group.size == 1:
            return Distributed(outputs, Full())
        if _all_entries(outputs):
            outputs = every_entry(outputs, plan.own.topk_ids.shape[0])
            return Distributed(outputs, Partial(self.group))
        rows = (self.placement.owners(plan.own.topk_ids) == self._ep_rank()).any(dim=1).nonzero()[:, 0]
        total = outputs.new_zeros(plan.own.topk_ids.shape[0], outputs.shape[1])
        total[rows] = outputs
        return Distributed(total, Partial(self.group))

    def _in_slot_order(self, outputs: Tensor, plan: DispatchPlan) -> Tensor:
        positions, counts = self.placement.slot_order(plan.own.topk_ids)
        if self.group.size > 1:
            outputs = self.group.all_gather_v(outputs, counts)
        return weighted_sum(outputs, plan.own.topk_weights, positions)

    def _ep_rank(self) -> int:
        return self.group.rank // self.placement.etp


def _all_entries(x: Tensor) -> bool:
    """On a GPU the experts get every token: picking those with an expert here would make the host wait for their number."""
    return x.is_cuda

"""Rows that NCCL's EP extension moves between nodes, by its low-latency kernels; see ``docs/gpu.md``.

The extension knows equally many experts on every rank, and no slices. So its ids are of this module's own
making: number ``local`` of rank r is ``r L + local``, with L experts a rank, copies included, and a slot
whose expert is sliced names the expert on each rank that has a slice. Steps with more rows than its buffers
are made for go another way.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from xpar.comm.communicator import Communicator, Pending, Tag
from xpar.comm.device.nccl_ep_exchange import MOST_TOKENS, NcclEp, NcclEpExchange, RowShape
from xpar.comm.dispatch.allgather import SMALL_GROUP, AllGatherDispatcher
from xpar.comm.dispatch.alltoall_early import EarlyAllToAllDispatcher
from xpar.comm.dispatch.base import (
    Capabilities,
    Dispatcher,
    DispatchPlan,
    DispatchRequest,
    agree_on_plan,
    aligned,
    count_traffic,
    pad_missing_outputs,
)
from xpar.comm.grid import ProcessGrid
from xpar.comm.handshake import CollectiveError
from xpar.comm.placement import Placement
from xpar.comm.reduction import Distributed, Full
from xpar.kernels.contracts import ExpertInput, Routing, Slots
from xpar.kernels.rows import weighted_sum


@dataclass
class NcclEpPlan:
    """The connection of a step, and what travels with its rows.

    Attributes:
        exchange: The connection.
        ids: ``[N, k']`` int64 ids as the extension has them, by ascending rank. N is T, in exact mode T k,
            and 1 on a rank without tokens; k' is k slots, in exact mode 1, times the slices.
        weights: ``[N, k']`` float32.
        arrived: What arrived here, once it is dispatched.
    """

    exchange: NcclEpExchange
    ids: Tensor
    weights: Tensor
    arrived: ExpertInput | None = None


@dataclass
class OtherWay:
    """The plan of a step whose rows another dispatcher moves, and what arrived once it is waited for."""

    dispatcher: Dispatcher
    plan: DispatchPlan
    arrived: ExpertInput | None = None


class NcclEpDispatcher(Dispatcher):
    """A dispatcher for GPU ranks of several nodes, through connections that all layers of the group share.

    In exact mode each slot of a token is a row of its own, which comes home unsummed.
    """

    name = "nccl-ep"
    capabilities = Capabilities(
        ("cuda",), needs_host_counts=False, graph_capture=True, pipelined=False, takes_slots=True
    )

    def __init__(self, group: Communicator, placement: Placement, connections: NcclEp) -> None:
        self.group, self.placement, self.connections = group, placement, connections
        self.local_experts = _local_experts(placement)
        self._ids = _extension_ids(placement, self.local_experts)

    @classmethod
    def impossible(cls, grid: ProcessGrid, placement: Placement, request: DispatchRequest) -> str | None:
        if (reason := super().impossible(grid, placement, request)) is not None:
            return reason
        if grid.moe.size == 1:
            return "a group of one rank has no peers"
        if grid.nccl_ep is None:
            return "rows do not travel by NCCL in this job"
        if grid.nccl_ep.refusal is not None:
            return grid.nccl_ep.refusal
        if request.coded_rows:
            return "it moves rows of numbers, and rows travel as fp8 codes here (--activations exact)"
        slots = request.top_k * placement.etp
        return grid.nccl_ep.why_not(_local_experts(placement), slots, request.hidden_size, request.dtype)

    @classmethod
    def unsuitable(cls, grid: ProcessGrid, placement: Placement, request: DispatchRequest) -> str | None:
        assert grid.nccl_ep is not None  # `impossible` has looked
        return None if grid.nccl_ep.spans_nodes else "all ranks are on one node, and it is for several"

    @classmethod
    def build(cls, grid: ProcessGrid, placement: Placement) -> Dispatcher:
        assert grid.nccl_ep is not None  # `impossible` has looked
        return cls(grid.moe, placement, grid.nccl_ep)

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
        etp, k = self.placement.etp, own.topk_ids.shape[1]
        if exact and etp > 1:
            raise CollectiveError(f"exact mode with etp={etp}: a sliced expert sums otherwise; use etp=1")
        rows = max(counts) * (k if exact else 1)
        if rows > MOST_TOKENS[-1]:
            other = self._other_way(rows, exact)
            plan = other.plan(own, tag=tag, hidden_size=hidden_size, dtype=dtype, exact=exact)
            return DispatchPlan(plan.local_routing, exact, plan.pending_traffic, OtherWay(other, plan))
        slots = (1 if exact else k) * etp
        reason = self.connections.why_not(self.local_experts, slots, hidden_size, dtype)
        if reason is not None:
            raise CollectiveError(f"dispatcher='nccl-ep': {reason}")
        most = next(n for n in MOST_TOKENS if rows <= n)
        shape = RowShape(most, slots, self.local_experts, hidden_size, dtype)
        detail = NcclEpPlan(self.connections.exchange(shape), *self._destinations(own, exact))
        promised = Pending(lambda: count_traffic(self.group.rank, own.topk_ids, self.placement, exact))
        return DispatchPlan(own, exact, promised, detail)

    def dispatch(self, hidden_states: Tensor, plan: DispatchPlan) -> Pending[ExpertInput]:
        detail: NcclEpPlan | OtherWay = plan.dispatcher_state
        if isinstance(detail, OtherWay):
            return _noted(detail, detail.dispatcher.dispatch(hidden_states, detail.plan))
        k = plan.local_routing.topk_ids.shape[1]
        x = hidden_states.repeat_interleave(k, 0) if plan.exact else hidden_states
        if not x.shape[0]:
            x = hidden_states.new_zeros(1, hidden_states.shape[1])  # a row that goes nowhere
        arrived = ExpertInput(*detail.exchange.dispatch(aligned(x), detail.ids, detail.weights))
        return _noted(detail, Pending(lambda: arrived))

    def combine(self, outputs: Tensor, plan: DispatchPlan) -> Pending[Distributed]:
        detail: NcclEpPlan | OtherWay = plan.dispatcher_state
        if isinstance(detail, OtherWay):
            return detail.dispatcher.combine(outputs, detail.plan)
        ids = _arrived(detail).topk_ids
        if plan.exact and outputs.shape[0] != ids.shape[0]:  # one row a slot that is here; waits for the GPU
            rows = outputs.new_zeros(ids.shape[0], detail.exchange.shape.width)
            rows[ids[:, 0] >= 0] = outputs
            outputs = rows
        return self._home(pad_missing_outputs(outputs, ids.shape[0]), plan)

    def combine_slots(self, slots: Slots, plan: DispatchPlan) -> Pending[Distributed]:
        detail: NcclEpPlan | OtherWay = plan.dispatcher_state
        arrived = _arrived(detail)
        if not plan.exact:
            return self.combine(_sum_slots(slots.rows, arrived.topk_weights, arrived.topk_ids), plan)
        if isinstance(detail, OtherWay):
            return self.combine(slots.rows[arrived.topk_ids.reshape(-1) >= 0], plan)
        return self._home(slots.rows, plan)

    def _home(self, rows: Tensor, plan: DispatchPlan) -> Pending[Distributed]:
        detail: NcclEpPlan = plan.dispatcher_state
        own = plan.local_routing
        back = detail.exchange.combine(aligned(rows), detail.ids.shape[0])
        if not plan.exact:
            return Pending(lambda: Distributed(back[: own.topk_ids.shape[0]], Full()))
        return Pending(lambda: Distributed(_sum_slots(back, own.topk_weights, own.topk_ids), Full()))

    def _other_way(self, rows: int, exact: bool) -> Dispatcher:
        """Return the dispatcher for more rows than a connection takes, which ``auto`` took otherwise."""
        is_recorded = self.placement.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if is_recorded and exact:
            raise RuntimeError(
                f"{rows} rows of exact mode while a graph is recorded; nccl-ep takes {MOST_TOKENS[-1]}"
            )
        small = is_recorded or self.group.size <= SMALL_GROUP
        other = (AllGatherDispatcher if small else EarlyAllToAllDispatcher)(self.group, self.placement)
        other.agreed = self.agreed
        return other

    def _destinations(self, routing: Routing, exact: bool) -> tuple[Tensor, Tensor]:
        """Return the ids and weights of :class:`NcclEpPlan`.

        Slots of one rank keep their order, and ranks ascend: in that order the extension adds results.
        """
        tokens, k = routing.topk_ids.shape
        ids = self._ids[routing.topk_ids.long()]  # [T, k, etp]
        weights = routing.topk_weights.float()[..., None].expand_as(ids)
        lead = (tokens * k, -1) if exact else (tokens, k * self.placement.etp)
        if not tokens:
            missing = ids.new_full((1, self.placement.etp * (1 if exact else k)), -1)
            return missing, torch.zeros_like(missing, dtype=torch.float32)
        ids, weights = ids.reshape(lead), weights.reshape(lead)
        if ids.shape[1] > 1 and self.group.size > 2:  # two addends have one sum
            ranks = ids.div(self.local_experts, rounding_mode="floor")
            order = ranks.argsort(dim=1, stable=True)
            ids, weights = ids.gather(1, order), weights.gather(1, order)
        return ids.contiguous(), weights.contiguous()


def _local_experts(placement: Placement) -> int:
    """Return L, the most experts of a rank, copies included; at least 1."""
    counts = torch.bincount(placement.owner, minlength=placement.ep + 1)[: placement.ep]
    return max(1, int(counts.max()))


def _extension_ids(placement: Placement, local_experts: int) -> Tensor:
    """Return ``[E + 1, etp]`` int64, the ids of every expert's slices; -1 for a dropped slot."""
    ranks = placement.owner[:, None] * placement.etp + torch.arange(placement.etp, device=placement.device)
    ids = ranks * local_experts + placement.local[:, None].long()
    return torch.where(placement.local[:, None] >= 0, ids, -1)


def _noted(detail: NcclEpPlan | OtherWay, pending: Pending[ExpertInput]) -> Pending[ExpertInput]:
    """Return ``pending``, and have ``detail`` note its result."""

    def wait() -> ExpertInput:
        detail.arrived = pending.wait()
        return detail.arrived

    return Pending(wait)


def _arrived(detail: NcclEpPlan | OtherWay) -> ExpertInput:
    if detail.arrived is None:
        raise RuntimeError("combine before dispatch was waited for: no row has arrived yet")
    return detail.arrived


def _sum_slots(rows: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Sum the slots of each entry, which lie at ``m k + j`` of ``rows``, times their weights: ``[M, H]``."""
    positions = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
    return weighted_sum(rows, weights, positions.masked_fill(ids < 0, -1))

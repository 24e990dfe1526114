"""Rows that GPU kernels store in the memory of their experts' ranks, and results at home.

All ranks' tokens have places in every rank's window, so nothing is counted on the GPU and nothing waits on
the host. What arrives is the experts' input, in place. Kernels and memory order:
:mod:`xpar.kernels.gpu.epochs`.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xpar.comm.communicator import Communicator, Pending, Tag
from xpar.comm.device.peer_window import PeerWindow
from xpar.comm.dispatch.base import (
    Capabilities,
    Dispatcher,
    DispatchPlan,
    DispatchRequest,
    agree_on_plan,
    aligned,
    count_traffic,
)
from xpar.comm.grid import ProcessGrid
from xpar.comm.handshake import CollectiveError
from xpar.comm.placement import Placement
from xpar.comm.reduction import Distributed, Full
from xpar.kernels.contracts import ExpertInput, Routing, Slots
from xpar.kernels.gpu.limits import label_of

if TYPE_CHECKING:
    from xpar.kernels.gpu.one_sided import Exchange, Step


@dataclass
class OneSidedPlan:
    """The sizes of a step, and the routing that its kernels read.

    Attributes:
        step: The sizes that the ranks agreed on.
        ids: ``[T, k]`` int32 expert ids of this rank's tokens, contiguous.
        weights: ``[T, k]`` float32, contiguous.
        label: The layer, and with ``--debug-collectives`` a digest of its step and sizes.
        exchange: The places of the step in the window, once it is dispatched.
        bias: ``[H]`` float32 that the sum at home takes in, or None.
        shared: ``[T, H]`` that it takes in after that, or None.
        residual: ``[T, H]`` that it takes in last, or None.
    """

    step: "Step"
    ids: Tensor
    weights: Tensor
    label: int = 0
    exchange: "Exchange | None" = None
    bias: Tensor | None = None
    shared: Tensor | None = None
    residual: Tensor | None = None


class OneSidedDispatcher(Dispatcher):
    """A dispatcher for GPU ranks of one node that map each other's memory.

    Rows travel through ``window``, which all layers of the group share. What arrives lies in the window until
    the next dispatch: whoever keeps it copies it. Rows of any dtype travel as opaque words, quantised values
    with their scales beside them too; ``dispatch`` reads their width from the rows.
    """

    name = "one-sided"
    capabilities = Capabilities(
        ("cuda",),
        needs_host_counts=False,
        graph_capture=True,
        pipelined=False,
        takes_slots=True,
        needs_transport=False,
        single_node=True,
        adds_at_home=True,
    )

    def __init__(self, group: Communicator, placement: Placement, window: PeerWindow) -> None:
        self.group, self.placement, self.window = group, placement, window
        self._owner, self._local = placement.owner.to(torch.int32), placement.local.to(torch.int32)

    @classmethod
    def impossible(cls, grid: ProcessGrid, placement: Placement, request: DispatchRequest) -> str | None:
        if (reason := super().impossible(grid, placement, request)) is not None:
            return reason
        if grid.peer_window is None:
            return "a group of one rank has no peers"
        return grid.peer_window.access.refusal

    @classmethod
    def unsuitable(cls, grid: ProcessGrid, placement: Placement, request: DispatchRequest) -> str | None:
        return None if grid.peer_window is None else grid.peer_window.access.slow

    @classmethod
    def build(cls, grid: ProcessGrid, placement: Placement) -> Dispatcher:
        assert grid.peer_window is not None  # `impossible` has looked
        return cls(grid.moe, placement, grid.peer_window)

    def plan(
        self,
        routing: Routing | BaseException,
        *,
        tag: Tag,
        hidden_size: int,
        dtype: torch.dtype,
        exact: bool = False,
    ) -> DispatchPlan:
        from xpar.kernels.gpu.one_sided import Step

        problem = self.window.problem()
        if problem is not None and not isinstance(routing, BaseException):
            routing = CollectiveError(problem)
        own, counts = agree_on_plan(self, routing, tag, hidden_size, dtype, exact)
        k = own.topk_ids.shape[1]
        step = Step(tuple(counts), k, hidden_size * dtype.itemsize, hidden_size, dtype, exact)
        ids = own.topk_ids.to(torch.int32).contiguous()
        alike = (tag.step, k, hidden_size, dtype.itemsize, exact, *counts)
        label = label_of(tag.layer, *(alike if self.group.checks_collectives() else ()))
        detail = OneSidedPlan(step, ids, own.topk_weights.float().contiguous(), label)
        promised = Pending(lambda: count_traffic(self.group.rank, own.topk_ids, self.placement, exact))
        return DispatchPlan(own, exact, promised, detail)

    def dispatch(self, hidden_states: Tensor, plan: DispatchPlan) -> Pending[ExpertInput]:
        detail: OneSidedPlan = plan.dispatcher_state
        x = aligned(hidden_states)
        step = replace(detail.step, row_bytes=x.shape[1] * x.element_size())
        exchange = detail.exchange = self.window.exchange(step)
        exchange.dispatch(
            x, detail.ids, detail.weights, self._owner, self._local, self.placement.etp, detail.label
        )
        arrived = ExpertInput(exchange.rows(x.dtype), exchange.topk_ids, exchange.topk_weights)
        return Pending(lambda: arrived)

    def output(self, plan: DispatchPlan, num_outputs: int, like: Tensor) -> Tensor | None:
        return None

    def combine(self, outputs: Tensor, plan: DispatchPlan) -> Pending[Distributed]:
        exchange = _begun(plan)
        if plan.exact:
            return self.combine_slots(Slots(_spread(outputs, exchange.topk_ids)), plan)
        exchange.rows_home(aligned(outputs), plan.dispatcher_state.label)
        return Pending(lambda: self._sum(exchange, plan))

    def combine_slots(self, slots: Slots, plan: DispatchPlan) -> Pending[Distributed]:
        exchange = _begun(plan)
        if plan.exact:
            exchange.rows_home(slots.rows, plan.dispatcher_state.label)
        else:
            exchange.weighted_home(slots.rows, plan.dispatcher_state.label)
        return Pending(lambda: self._sum(exchange, plan))

    def add_at_home(
        self, plan: DispatchPlan, bias: Tensor | None, shared: Tensor | None, residual: Tensor | None
    ) -> None:
        if plan.exact:
            raise ValueError("exact mode sums slots, not ranks: nothing is added at home")
        plan.dispatcher_state.bias = None if bias is None else bias.float().contiguous()
        plan.dispatcher_state.shared = None if shared is None else shared.contiguous()
        plan.dispatcher_state.residual = None if residual is None else residual.contiguous()

    def _sum(self, exchange: "Exchange", plan: DispatchPlan) -> Distributed:
        from xpar.kernels.gpu.rows import weighted_sum

        detail: OneSidedPlan = plan.dispatcher_state
        if plan.exact:
            total = weighted_sum(exchange.slots_at_home(), detail.weights, detail.ids, in_place=True)
        else:
            total = exchange.sum_ranks(
                detail.ids, self._owner, self.placement.etp,
                shared=detail.shared, residual=detail.residual, bias=detail.bias,
            )  # fmt: skip
        return Distributed(total, Full())


def _begun(plan: DispatchPlan) -> "Exchange":
    """Return the exchange that dispatch began."""
    exchange: Exchange | None = plan.dispatcher_state.exchange
    if exchange is None:
        raise RuntimeError("combine before dispatch: no row has a place yet")
    return exchange


def _spread(outputs: Tensor, ids: Tensor) -> Tensor:
    """Put the outputs of active slots [S, H] at row m k + j of [M k, H]; waits for the GPU."""
    active = ids.reshape(-1) >= 0
    if not outputs.shape[0] or outputs.shape[0] == active.numel():
        return outputs.contiguous()
    rows = outputs.new_empty(active.numel(), outputs.shape[1])
    rows[active] = outputs
    return rows

"""Dispatch of one row per (token, destination rank), whose slots are summed there."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xpar.comm.communicator import Communicator, Pending, Tag
from xpar.comm.dispatch.base import (
    Capabilities,
    Dispatcher,
    DispatchPlan,
    Traffic,
    agree_on_plan,
    decode_routing,
    destination_mask,
    encode_routing,
)
from xpar.comm.grid import ProcessGrid
from xpar.comm.placement import Placement
from xpar.comm.reduction import Distributed, Full
from xpar.kernels.contracts import ExpertInput, Routing
from xpar.kernels.rows import gather_rows, sum_rows, weighted_sum


@dataclass(frozen=True)
class AllToAllPlan:
    """The plan of one exchange.

    Attributes:
        tokens: [S] int64, the token of each row that this rank sends, by destination rank and then token.
        arrived: Local ids and weights [M, k] of each row that arrives.
        send: Rows to each rank.
        recv: Rows from each rank.
        back_send: Rows to each rank on the way back.
        back_recv: Rows from each rank on the way back.
        slots: In exact mode, the flat (token, slot) index of each row that comes back, int64; else None.
        rows: [M] int64, the positions of the arrived rows if they do not lie one after the other; else None.
    """

    tokens: Tensor
    arrived: Routing
    send: list[int]
    recv: list[int]
    back_send: list[int]
    back_recv: list[int]
    slots: Tensor | None
    rows: Tensor | None = None


class AllToAllDispatcher(Dispatcher):
    """The general dispatcher, for any group on any number of nodes.

    On GPUs its subclass :class:`~xpar.comm.dispatch.alltoall_early.EarlyAllToAllDispatcher` takes its place.
    """

    name = "alltoall"
    capabilities = Capabilities(("cpu", "cuda"), needs_host_counts=True, graph_capture=False)

    def __init__(self, group: Communicator, placement: Placement) -> None:
        self.group, self.placement = group, placement

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
        destination, tokens, send = rows_by_destination(own.topk_ids, self.placement)
        recv = exchange_counts(self.group, send)
        ids = local_ids_at_destination(own.topk_ids, destination, tokens, self.placement)
        encoded = encode_routing(Routing(ids, own.topk_weights[tokens]))
        arrived = decode_routing(self.group.all_to_all_v(encoded, send, recv).wait())
        back_send, back_recv, slots = recv, send, None
        if exact:
            slots, back_recv = returning_slots(ids >= 0, tokens, send)
            back_send = sum_per_rank((arrived.topk_ids >= 0).sum(1), recv)
        state = AllToAllPlan(tokens, arrived, send, recv, back_send, back_recv, slots)
        return DispatchPlan(own, exact, Traffic.of(self.group.rank, send, sum(back_recv)), state)

    def dispatch(self, hidden_states: Tensor, plan: DispatchPlan) -> Pending[ExpertInput]:
        state: AllToAllPlan = plan.dispatcher_state
        rows = hidden_states.new_empty(sum(state.recv), hidden_states.shape[1])
        first, own = sum(state.send[: self.group.rank]), state.send[self.group.rank]
        at = sum(state.recv[: self.group.rank])
        gather_rows(hidden_states, state.tokens[first : first + own], out=rows[at : at + own])
        outgoing = hidden_states.new_empty(len(state.tokens), hidden_states.shape[1])
        for part in (slice(0, first), slice(first + own, None)):
            gather_rows(hidden_states, state.tokens[part], out=outgoing[part])
        pending = self.group.all_to_all_v(outgoing, state.send, state.recv, out=rows, skip=self.group.rank)
        arrived = state.arrived
        return Pending(lambda: ExpertInput(pending.wait(), arrived.topk_ids, arrived.topk_weights))

    def combine(self, outputs: Tensor, plan: DispatchPlan) -> Pending[Distributed]:
        return return_rows(self.group, outputs, plan.dispatcher_state, plan.local_routing)


def exchange_counts(group: Communicator, send: list[int]) -> list[int]:
    """Tell each rank of ``group`` how many rows it gets; return how many each sends here."""
    ones = [1] * group.size
    received = group.all_to_all_v(torch.tensor(send, dtype=torch.int64), ones, ones).wait()
    return [int(n) for n in received.tolist()]


def rows_by_destination(topk_ids: Tensor, placement: Placement) -> tuple[Tensor, Tensor, list[int]]:
    """List the rows to send for ``topk_ids`` [T, k]: their ranks and tokens [S], and rows per rank."""
    mask = destination_mask(topk_ids, placement)
    pairs = mask.nonzero()
    return pairs[:, 0], pairs[:, 1], mask.sum(1).tolist()


def local_ids_at_destination(
    topk_ids: Tensor, destination: Tensor, tokens: Tensor, placement: Placement
) -> Tensor:
    """Return local ids of sent rows' slots at ``destination`` [S]: [S, k] int32, -1 for experts elsewhere."""
    ids = topk_ids[tokens].long()
    is_at_destination = placement.owner[ids] == (destination // placement.etp)[:, None]
    return torch.where(is_at_destination, placement.local[ids], -1)


def returning_slots(active: Tensor, tokens: Tensor, send: list[int]) -> tuple[Tensor, list[int]]:
    """List the slots whose outputs come back in exact mode, by rank, and their number per rank.

    ``active`` [S, k] bool: the slots whose expert is where the row was sent. ``tokens`` [S]: each row's
    token. The slots are flat (token, slot) indices.
    """
    k = active.shape[1]
    slots = (tokens[:, None] * k + torch.arange(k, device=tokens.device))[active]
    return slots, sum_per_rank(active.sum(1), send)


def invert_slots(slots: Tensor, shape: torch.Size) -> Tensor:
    """Return for each slot of ``shape`` its row in ``slots``: [T, k] int64, -1 for one that is not there."""
    positions = torch.full((shape.numel(),), -1, dtype=torch.int64, device=slots.device)
    positions[slots] = torch.arange(len(slots), device=slots.device)
    return positions.view(shape)


def return_rows(
    group: Communicator, outputs: Tensor, state: AllToAllPlan, routing: Routing
) -> Pending[Distributed]:
    """Send each row's output home and sum there; collective.

    ``outputs``: of the rows that arrived here, or in exact mode of their slots. The sum [T, H] is by source
    rank, or in exact mode in slot order with the weights.
    """
    back = outputs.new_empty(sum(state.back_recv), outputs.shape[1])
    r, send, recv = group.rank, state.back_send, state.back_recv
    start, at, own = sum(send[:r]), sum(recv[:r]), send[r]
    pending = group.all_to_all_v(outputs, send, recv, out=back, skip=r)
    back[at : at + own] = outputs[start : start + own]
    return Pending(lambda: Distributed(_sum_at_home(pending.wait(), state, routing), Full()))


def _sum_at_home(back: Tensor, state: AllToAllPlan, routing: Routing) -> Tensor:
    if state.slots is None:
        return sum_rows(back, state.tokens, routing.topk_ids.shape[0])
    return weighted_sum(back, routing.topk_weights, invert_slots(state.slots, routing.topk_ids.shape))


def sum_per_rank(values: Tensor, rows: list[int]) -> list[int]:
    """Sum ``values`` [S] over each rank's rows, of which rank r has ``rows[r]`` in sequence."""
    ends = np.cumsum([0, *rows])
    total = torch.nn.functional.pad(values.cumsum(0), (1, 0)).cpu()[torch.from_numpy(ends)]
    return [int(n) for n in total.diff().tolist()]

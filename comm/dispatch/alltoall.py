"""One row per (token, destination rank), never one per (token, expert); its slots are summed where it went."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xpar.comm.communicator import Communicator, Pending
from xpar.comm.dispatch.base import (
    Capabilities,
    DispatchPlan,
    Traffic,
    agree_on_plan,
    decode_routing,
    encode_routing,
    goes_to,
)
from xpar.comm.dispatch.outgoing_rows import OutgoingRows, local_ids_at_destination
from xpar.comm.handshake import Tag
from xpar.comm.placement import Placement
from xpar.comm.reduction import Distributed, Full
from xpar.kernels.contracts import ExpertInput, Routing
from xpar.kernels.rows import gather_rows, sum_rows, weighted_sum


@dataclass(frozen=True)
class AllToAllPlan:
    """``tokens`` [S]: the token of each row sent, by destination; ``arrived``: local ids and weights of each row.

    ``send``, ``recv``: rows per rank. ``back_send``, ``back_recv``: rows per rank on the way back.
    ``slots`` [S']: in exact mode the flat (token, slot) index of each row that comes back.
    ``rows`` [M]: where the arrived rows lie, if not one after the other.
    """

    tokens: Tensor
    arrived: Routing
    send: list[int]
    recv: list[int]
    back_send: list[int]
    back_recv: list[int]
    slots: Tensor | None
    rows: Tensor | None = None


class CountsInFlight:
    """The plan of rows whose number is not known yet; :class:`AllToAllPlan` once dispatch has learnt it."""

    def __init__(self, leaving: OutgoingRows) -> None:
        self.leaving = leaving
        self._detail: AllToAllPlan | None = None

    def settle(self, detail: AllToAllPlan) -> None:
        self._detail = detail

    def settled(self) -> AllToAllPlan:
        if self._detail is None:
            raise RuntimeError("combine before dispatch: the plan does not know yet how many rows there are")
        return self._detail


class AllToAllDispatcher:
    """The general dispatcher: any number of ranks, uneven tokens and experts.

    ``early``: begin to pack before it is known how many rows leave; by default on a GPU.
    """

    name = "alltoall"
    capabilities = Capabilities(("cpu", "cuda"), needs_host_counts=True, graph_capture=False)

    def __init__(self, group: Communicator, placement: Placement, early: bool | None = None) -> None:
        self.group, self.placement = group, placement
        self.early = placement.device.type == "cuda" if early is None else early

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
        if self.early and not exact:
            leaving = OutgoingRows.start(own, self.placement)
            promised = Pending(lambda: self._traffic(leaving.counts.wait(), leaving.counts.wait()))
            return DispatchPlan(own, exact, promised, CountsInFlight(leaving))
        destination, tokens, send = destinations(own.topk_ids, self.placement)
        recv = exchange_counts(self.group, send)
        ids = local_ids_at_destination(own.topk_ids, destination, tokens, self.placement)
        packed = encode_routing(Routing(ids, own.topk_weights[tokens]))
        arrived = decode_routing(self.group.all_to_all_v(packed, send, recv).wait())
        back_send, back_recv, slots = recv, send, None
        if exact:
            slots, back_recv = slots_back(ids >= 0, tokens, send)
            back_send = per_rank((arrived.topk_ids >= 0).sum(1), recv)
        detail = AllToAllPlan(tokens, arrived, send, recv, back_send, back_recv, slots)
        return DispatchPlan(own, exact, self._traffic(send, back_recv), detail)

    def dispatch(self, hidden_states: Tensor, plan: DispatchPlan) -> Pending[ExpertInput]:
        if isinstance(plan.detail, CountsInFlight):
            return self._dispatch_early(hidden_states, plan.detail)
        d: AllToAllPlan = plan.detail
        rows = hidden_states.new_empty(sum(d.recv), hidden_states.shape[1])
        first, own = sum(d.send[: self.group.rank]), d.send[self.group.rank]
        mine = slice(first, first + own)
        at = sum(d.recv[: self.group.rank])
        gather_rows(hidden_states, d.tokens[mine], out=rows[at : at + own])
        leaving = hidden_states.new_empty(len(d.tokens), hidden_states.shape[1])
        for part in (slice(0, first), slice(first + own, None)):
            gather_rows(hidden_states, d.tokens[part], out=leaving[part])
        pending = self.group.all_to_all_v(leaving, d.send, d.recv, out=rows, skip=self.group.rank)
        return Pending(lambda: ExpertInput(pending.wait(), d.arrived.topk_ids, d.arrived.topk_weights))

    def output(self, plan: DispatchPlan, rows: int, like: Tensor) -> Tensor | None:
        return None

    def combine(self, outputs: Tensor, plan: DispatchPlan) -> Pending[Distributed]:
        if isinstance(plan.detail, CountsInFlight):
            d, tokens = plan.detail.settled(), plan.own.topk_ids.shape[0]
            back = self.group.all_to_all_v(outputs, d.back_send, d.back_recv)
            return Pending(lambda: Distributed(sum_rows(back.wait(), d.tokens, tokens), Full()))
        return return_rows(self.group, outputs, plan.detail, plan.own)

    def _dispatch_early(self, hidden_states: Tensor, early: "CountsInFlight") -> Pending[ExpertInput]:
        """The GPU packs while the host waits for this rank's counts and exchanges them with the others'."""
        leaving = early.leaving
        rows = leaving.pack_early(hidden_states)
        send = leaving.counts.wait()
        tokens, packed = leaving.tokens[: sum(send)], leaving.packed[: sum(send)]
        if rows is None:
            rows = gather_rows(hidden_states, tokens)
        recv = exchange_counts(self.group, send)
        arrived = decode_routing(self.group.all_to_all_v(packed, send, recv).wait())
        pending = self.group.all_to_all_v(rows[: sum(send)], send, recv)
        early.settle(AllToAllPlan(tokens, arrived, send, recv, recv, send, None))
        return Pending(lambda: ExpertInput(pending.wait(), arrived.topk_ids, arrived.topk_weights))

    def _traffic(self, send: list[int], back: list[int]) -> Traffic:
        return Traffic.of(self.group.rank, send, sum(back))


def exchange_counts(group: Communicator, send: list[int]) -> list[int]:
    """How many rows each rank of ``group`` will send here, where ``send`` go from here to each of them."""
    ones = [1] * group.size
    return [
        int(n) for n in group.all_to_all_v(torch.tensor(send, dtype=torch.int64), ones, ones).wait().tolist()
    ]


def destinations(topk_ids: Tensor, placement: Placement) -> tuple[Tensor, Tensor, list[int]]:
    """(rank, token) of every row to send, by rank and then token, and the rows per rank: rows de-duplicated by rank."""
    by_rank = goes_to(topk_ids, placement)
    pairs = by_rank.nonzero()
    return pairs[:, 0], pairs[:, 1], by_rank.sum(1).tolist()


def slots_back(active: Tensor, tokens: Tensor, send: list[int]) -> tuple[Tensor, list[int]]:
    """In exact mode: the flat (token, slot) of each row that comes back, by rank, and the rows per rank.

    ``active`` [S, k] bool: which slots of the tokens ``tokens`` [S] have their expert where the row was sent.
    """
    k = active.shape[1]
    slots = (tokens[:, None] * k + torch.arange(k, device=tokens.device))[active]
    return slots, per_rank(active.sum(1), send)


def slot_positions(slots: Tensor, shape: torch.Size) -> Tensor:
    """[T, k] int64: for each slot of ``shape`` the row that holds its output, where row r is that of ``slots[r]``; -1: none."""
    positions = torch.full((shape.numel(),), -1, dtype=torch.int64, device=slots.device)
    positions[slots] = torch.arange(len(slots), device=slots.device)
    return positions.view(shape)


def return_rows(group: Communicator, outputs: Tensor, d: AllToAllPlan, own: Routing) -> Pending[Distributed]:
    """Send each row's output home and sum there: by source rank, or in exact mode in slot order with the weights."""
    back = outputs.new_empty(sum(d.back_recv), outputs.shape[1])
    r, send, recv = group.rank, d.back_send, d.back_recv
    start, at, mine = sum(send[:r]), sum(recv[:r]), send[r]
    pending = group.all_to_all_v(outputs, send, recv, out=back, skip=r)
    back[at : at + mine] = outputs[start : start + mine]
    return Pending(lambda: Distributed(_sum_at_home(pending.wait(), d, own), Full()))


def _sum_at_home(back: Tensor, d: AllToAllPlan, own: Routing) -> Tensor:
    if d.slots is None:
        return sum_rows(back, d.tokens, own.topk_ids.shape[0])
    return weighted_sum(back, own.topk_weights, slot_positions(d.slots, own.topk_ids.shape))


def per_rank(rows_of_entry: Tensor, entries_of_rank: list[int]) -> list[int]:
    ends = np.cumsum([0, *entries_of_rank])
    total = torch.nn.functional.pad(rows_of_entry.cumsum(0), (1, 0)).cpu()[torch.from_numpy(ends)]
    return [int(n) for n in total.diff().tolist()]
